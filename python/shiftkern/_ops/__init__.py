"""The operators ``torch.ops.shiftkern.*``, one file per domain."""
