"""How the small judges in ``tiny/judges`` were made. They are not the real ones.

PickScore, the LAION aesthetic predictor and DeQA-Score weigh gigabytes and have seen what people
like. The judges here weigh two megabytes and have seen procedural scenes. They exist so that the
same code that loads and runs the real weights loads and runs these: the same architectures, file
formats and options, offline and on a CPU. What they say holds for the embedded pipeline's images
only; no number from them compares to a published one.

- ``clip``: a CLIP that tells which prompt a scene belongs to, for the heads ``pickscore`` and
  ``clipscore``.
- ``aesthetic``: an affine head on that CLIP, taught the rule in ``rule``, for the head
``aesthetic``.
- ``deqa``: a DeQA that rates what ``degradations`` did to a scene, for the head ``deqa``.

``scripts/dev/make_judges.py`` makes all three from nothing but the embedded pipeline's autoencoder.
"""
