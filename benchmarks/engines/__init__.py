"""vLLM under measurement: engines, servers, peers, traffic, and what is written of them."""
