#include "row_statistics.cuh"

template void megatron_rlvr::launch_row_statistics<__half>(const RowStatisticsArguments&, const RowLaunch&);
