"""fasttrain: MobileNetV3 on ImageNet, as fast as the hardware allows.

Read in the order train, config, loop, data, then the rest as it is called.
"""

__version__ = "0.1.0"  # here, as a checkout on PYTHONPATH has no metadata
