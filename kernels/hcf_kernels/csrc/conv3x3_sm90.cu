// y = activation(scale_a * scale_b * conv3x3(a, b) + bias) + residual for sm_90a, padding 1, NHWC;
// see gemm_sm90.cuh. map_a: (B, H, W, C), boxes of BLOCK_M pixels; map_b: (N, 9, C), boxes of
// PART_ROWS rows of one tap. scale_a is one a pixel of y, or one for all.
#define CONVOLUTION 1
#include "gemm_sm90.cuh"

HCF_CLUSTER_KERNEL(THREADS, CLUSTER) conv3x3_sm90(HCF_GRID_CONSTANT TensorMap map_a,
                                          HCF_GRID_CONSTANT TensorMap map_b, Problem p) {
    run_pipeline(map_a, map_b, p);
}

#ifdef HCF_EMULATE
extern "C" const char* emulate(emulation::Launch launch, const TensorMap* a, const TensorMap* b,
                               Problem p) {
    return emulation::run(launch, [&] { conv3x3_sm90(*a, *b, p); });
}
#endif
