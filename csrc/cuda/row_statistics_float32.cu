#include "row_statistics.cuh"

template void megatron_rlvr::launch_row_statistics<float>(const RowStatisticsArguments&, const RowLaunch&);
