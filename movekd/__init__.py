"""Distil several vision encoders into one, from a cache of their features."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes if it is installed. On some CPUs it then warns in each process that a
# kernel for inference is not there, which would come from the hub and which movekd switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
