"""Everything that touches megatron-core. No other package imports it.

Importing this package makes megatron-core usable on a machine without a GPU, whenever and by whomever it is imported.
"""

from megatron_rlvr.megatron.cpu_shim import install_before_megatron_core

install_before_megatron_core()
