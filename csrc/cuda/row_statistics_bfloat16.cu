#include "row_statistics.cuh"

template void megatron_rlvr::launch_row_statistics<__nv_bfloat16>(const RowStatisticsArguments&, const RowLaunch&);
