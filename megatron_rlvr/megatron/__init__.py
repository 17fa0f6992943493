"""The interface to megatron-core, which no other package imports.

Importing this package makes megatron-core usable on a machine without a GPU, whenever megatron-core is imported.
"""

from megatron_rlvr.megatron.cpu_shim import install_before_megatron_core

install_before_megatron_core()
