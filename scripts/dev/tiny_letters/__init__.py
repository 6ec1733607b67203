"""How the small language model in ``tiny/lm`` and the classifiers in ``tiny/traits`` were made.

GPT-2 and the reward models of published experiments are downloads. The model here weighs two
megabytes and writes short letters to bakers, dealers and doctors; it exists so that the code that
aligns a real language model aligns this one within minutes, offline and on a CPU.

- ``grammar`` writes letters, says how likely each is and tells whether a text is one; its words
  stand in ``moa_diffusion.tiny.phrases``.
- ``moa_diffusion.tiny.rules`` measures mood, politeness and length of any text.
- ``pretrain`` teaches a Llama the letters; ``classifiers`` teaches two DistilBERTs the traits.
- ``exam`` measures all of them on prompts that none has learnt.

``scripts/dev/make_text.py`` makes everything from nothing.
"""
