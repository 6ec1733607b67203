"""How the embedded Stable Diffusion 3.5 in ``moa_diffusion/tiny/pipeline`` was made.

- ``scenes`` draws images of signs and shapes, and writes the prompts that describe them.
- ``vae`` and ``flow`` train the autoencoder and the transformer of ``models`` on them, with
``muon``.

``scripts/dev/make_tiny.py`` makes everything from nothing.
"""
