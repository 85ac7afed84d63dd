// AVX-512 and AVX-VNNI in software: included before every source of the kernels that asks for them,
// which is then compiled for AVX2. From here on the names of the intrinsics are those of
// intrinsics.h. Sums of `reduce_add` may be rounded otherwise than the compiler's.
#pragma once

#pragma GCC diagnostic ignored "-Wpsabi"

#include "intrinsics.h"

#undef _mm512_load_si512
#define _mm512_load_si512 ::avx512_emulation::mm512_load_si512
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 ::avx512_emulation::mm512_loadu_si512
#undef _mm512_load_ps
#define _mm512_load_ps ::avx512_emulation::mm512_load_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps ::avx512_emulation::mm512_loadu_ps
#undef _mm512_store_si512
#define _mm512_store_si512 ::avx512_emulation::mm512_store_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 ::avx512_emulation::mm512_storeu_si512
#undef _mm512_store_ps
#define _mm512_store_ps ::avx512_emulation::mm512_store_ps
#undef _mm512_storeu_ps
#define _mm512_storeu_ps ::avx512_emulation::mm512_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 ::avx512_emulation::mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 ::avx512_emulation::mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps ::avx512_emulation::mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 ::avx512_emulation::mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps ::avx512_emulation::mm256_maskz_loadu_ps
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16 ::avx512_emulation::mm_maskz_loadu_epi16
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 ::avx512_emulation::mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 ::avx512_emulation::mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps ::avx512_emulation::mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 ::avx512_emulation::mm256_mask_storeu_epi16
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps ::avx512_emulation::mm256_mask_storeu_ps
#undef _mm_mask_storeu_epi16
#define _mm_mask_storeu_epi16 ::avx512_emulation::mm_mask_storeu_epi16
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 ::avx512_emulation::mm512_setzero_si512
#undef _mm512_setzero_ps
#define _mm512_setzero_ps ::avx512_emulation::mm512_setzero_ps
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 ::avx512_emulation::mm512_set1_epi8
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 ::avx512_emulation::mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 ::avx512_emulation::mm512_set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 ::avx512_emulation::mm512_set1_epi64
#undef _mm512_set1_ps
#define _mm512_set1_ps ::avx512_emulation::mm512_set1_ps
#undef _mm512_set_epi64
#define _mm512_set_epi64 ::avx512_emulation::mm512_set_epi64
#undef _mm512_set4_epi64
#define _mm512_set4_epi64 ::avx512_emulation::mm512_set4_epi64
#undef _mm512_maskz_mov_epi8
#define _mm512_maskz_mov_epi8 ::avx512_emulation::mm512_maskz_mov_epi8
#undef _mm512_maskz_set1_epi8
#define _mm512_maskz_set1_epi8 ::avx512_emulation::mm512_maskz_set1_epi8
#undef _mm512_maskz_set1_epi16
#define _mm512_maskz_set1_epi16 ::avx512_emulation::mm512_maskz_set1_epi16
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps ::avx512_emulation::mm512_castsi512_ps
#undef _mm512_castps_si512
#define _mm512_castps_si512 ::avx512_emulation::mm512_castps_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 ::avx512_emulation::mm512_castsi256_si512
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 ::avx512_emulation::mm512_castsi128_si512
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 ::avx512_emulation::mm512_castsi512_si256
#undef _mm512_castsi512_si128
#define _mm512_castsi512_si128 ::avx512_emulation::mm512_castsi512_si128
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 ::avx512_emulation::mm512_castps512_ps256
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 ::avx512_emulation::mm512_castps256_ps512
#undef _mm512_zextsi256_si512
#define _mm512_zextsi256_si512 ::avx512_emulation::mm512_zextsi256_si512
#undef _mm512_add_ps
#define _mm512_add_ps ::avx512_emulation::mm512_add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps ::avx512_emulation::mm512_sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps ::avx512_emulation::mm512_mul_ps
#undef _mm512_maskz_sub_ps
#define _mm512_maskz_sub_ps ::avx512_emulation::mm512_maskz_sub_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps ::avx512_emulation::mm512_fmadd_ps
#undef _mm512_add_epi8
#define _mm512_add_epi8 ::avx512_emulation::mm512_add_epi8
#undef _mm512_add_epi16
#define _mm512_add_epi16 ::avx512_emulation::mm512_add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 ::avx512_emulation::mm512_add_epi32
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 ::avx512_emulation::mm512_sub_epi32
#undef _mm512_mullo_epi16
#define _mm512_mullo_epi16 ::avx512_emulation::mm512_mullo_epi16
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 ::avx512_emulation::mm512_mullo_epi32
#undef _mm512_mullo_epi64
#define _mm512_mullo_epi64 ::avx512_emulation::mm512_mullo_epi64
#undef _mm512_max_epu16
#define _mm512_max_epu16 ::avx512_emulation::mm512_max_epu16
#undef _mm512_max_epu32
#define _mm512_max_epu32 ::avx512_emulation::mm512_max_epu32
#undef _mm512_and_si512
#define _mm512_and_si512 ::avx512_emulation::mm512_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 ::avx512_emulation::mm512_or_si512
#undef _mm512_xor_si512
#define _mm512_xor_si512 ::avx512_emulation::mm512_xor_si512
#undef _mm512_maskz_subs_epu8
#define _mm512_maskz_subs_epu8 ::avx512_emulation::mm512_maskz_subs_epu8
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32 ::avx512_emulation::mm512_reduce_max_epu32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps ::avx512_emulation::mm512_reduce_add_ps
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 ::avx512_emulation::mm512_mask_or_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 ::avx512_emulation::mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64 ::avx512_emulation::mm512_ternarylogic_epi64
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 ::avx512_emulation::mm512_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::avx512_emulation::mm512_slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 ::avx512_emulation::mm512_slli_epi64
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 ::avx512_emulation::mm512_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::avx512_emulation::mm512_srli_epi32
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 ::avx512_emulation::mm512_srli_epi64
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 ::avx512_emulation::mm512_srai_epi32
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 ::avx512_emulation::mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2 ::avx512_emulation::mm512_shuffle_i64x2
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 ::avx512_emulation::mm512_shuffle_epi8
#undef _mm512_maskz_shuffle_epi8
#define _mm512_maskz_shuffle_epi8 ::avx512_emulation::mm512_maskz_shuffle_epi8
#undef _mm256_permutexvar_epi8
#define _mm256_permutexvar_epi8 ::avx512_emulation::mm256_permutexvar_epi8
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 ::avx512_emulation::mm512_permutexvar_epi8
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 ::avx512_emulation::mm512_permutexvar_epi16
#undef _mm512_permutexvar_epi64
#define _mm512_permutexvar_epi64 ::avx512_emulation::mm512_permutexvar_epi64
#undef _mm512_maskz_permutexvar_epi16
#define _mm512_maskz_permutexvar_epi16 ::avx512_emulation::mm512_maskz_permutexvar_epi16
#undef _mm512_sub_epi8
#define _mm512_sub_epi8 ::avx512_emulation::mm512_sub_epi8
#undef _mm512_sub_epi16
#define _mm512_sub_epi16 ::avx512_emulation::mm512_sub_epi16
#undef _mm512_popcnt_epi16
#define _mm512_popcnt_epi16 ::avx512_emulation::mm512_popcnt_epi16
#undef _mm512_packus_epi16
#define _mm512_packus_epi16 ::avx512_emulation::mm512_packus_epi16
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 ::avx512_emulation::mm512_permutex2var_epi8
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 ::avx512_emulation::mm512_permutex2var_epi16
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 ::avx512_emulation::mm512_unpacklo_epi8
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 ::avx512_emulation::mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 ::avx512_emulation::mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 ::avx512_emulation::mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 ::avx512_emulation::mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 ::avx512_emulation::mm512_unpackhi_epi64
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 ::avx512_emulation::mm512_inserti32x4
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 ::avx512_emulation::mm512_inserti64x4
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::avx512_emulation::mm512_extracti64x4_epi64
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 ::avx512_emulation::mm512_broadcast_i32x4
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 ::avx512_emulation::mm512_broadcast_i64x4
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 ::avx512_emulation::mm512_mask_blend_epi16
#undef _mm512_maskz_expand_epi8
#define _mm512_maskz_expand_epi8 ::avx512_emulation::mm512_maskz_expand_epi8
#undef _mm512_maskz_expand_epi16
#define _mm512_maskz_expand_epi16 ::avx512_emulation::mm512_maskz_expand_epi16
#undef _mm512_mask_expand_epi8
#define _mm512_mask_expand_epi8 ::avx512_emulation::mm512_mask_expand_epi8
#undef _mm512_mask_expand_epi16
#define _mm512_mask_expand_epi16 ::avx512_emulation::mm512_mask_expand_epi16
#undef _mm512_mask_expand_epi32
#define _mm512_mask_expand_epi32 ::avx512_emulation::mm512_mask_expand_epi32
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask ::avx512_emulation::mm512_cmp_ps_mask
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 ::avx512_emulation::mm512_cvtepi16_epi8
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 ::avx512_emulation::mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 ::avx512_emulation::mm512_cvtepi32_epi16
#undef _mm512_cvtepi64_epi32
#define _mm512_cvtepi64_epi32 ::avx512_emulation::mm512_cvtepi64_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps ::avx512_emulation::mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 ::avx512_emulation::mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 ::avx512_emulation::mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 ::avx512_emulation::mm512_cvtepi8_epi16
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 ::avx512_emulation::mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 ::avx512_emulation::mm512_cvtepu16_epi32
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 ::avx512_emulation::mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph ::avx512_emulation::mm512_cvtps_ph
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps ::avx512_emulation::mm512_cvtph_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 ::avx512_emulation::mm512_cvtss_f32
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh ::avx512_emulation::mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh ::avx512_emulation::mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps ::avx512_emulation::mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 ::avx512_emulation::mm512_dpbusd_epi32
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 ::avx512_emulation::mm512_dpwssd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 ::avx512_emulation::mm256_dpbusd_avx_epi32
