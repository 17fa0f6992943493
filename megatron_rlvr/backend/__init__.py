"""Everything that touches megatron-core. Import `device` before any module of megatron.core."""
