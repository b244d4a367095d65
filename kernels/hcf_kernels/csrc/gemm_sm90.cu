// y = activation(scale_a * scale_b * (a @ b^T) + bias) + residual for sm_90a; see gemm_sm90.cuh.
// map_a: (M, K), boxes of BLOCK_M rows; map_b: (N, K), boxes of PART_ROWS rows.
#include "gemm_sm90.cuh"

HCF_CLUSTER_KERNEL(THREADS, CLUSTER) gemm_sm90(HCF_GRID_CONSTANT TensorMap map_a,
                                       HCF_GRID_CONSTANT TensorMap map_b, Problem p) {
    run_pipeline(map_a, map_b, p);
}

#ifdef HCF_EMULATE
extern "C" const char* emulate(emulation::Launch launch, const TensorMap* a, const TensorMap* b,
                               Problem p) {
    return emulation::run(launch, [&] { gemm_sm90(*a, *b, p); });
}
#endif
