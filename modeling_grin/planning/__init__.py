"""What training on many devices costs: bytes per device, bytes sent, time per step. Formulas; nothing is run.

Memory and communication follow this package's model in transformers' engines, tensor by tensor, and are tested against
real runs. Time is a roofline with the constants of `Assumptions`. `docs/scaling.md` says what was compared.
"""
