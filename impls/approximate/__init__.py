"""Approximate attention, to be measured beside exact kernels: answers are compared with exact attention, not judged.

The sizes below make a query meet about 256 keys, or their summaries, whatever the sequence length, so that the methods
spend alike. Nothing is trained: parameters that a model would learn are fixed, or random with a fixed seed.
"""
