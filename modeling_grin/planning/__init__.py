"""Estimate training on many devices: bytes per device, bytes sent, time per step. Nothing is run.

Memory and communication follow this package's model in transformers' engines, tensor by tensor, and are tested against
real runs. Time is a roofline with the constants of `Assumptions`. `docs/scaling.md` says what was compared.
"""
