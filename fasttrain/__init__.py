"""fasttrain: MobileNetV3 on ImageNet, as fast as the hardware allows.

Read in the order train, config, loop, data, then the rest as it is called.
"""
