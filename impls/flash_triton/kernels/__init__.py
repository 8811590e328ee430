"""The device code: primitives shared by all kernels, forward, backward."""
