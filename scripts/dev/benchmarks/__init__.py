"""What training costs: against a plain pipeline call on the CPU, and phase by phase on a GPU.

Whole steps are those of the product's own ``Trainer``, made by ``build`` from a configuration. Only
the pipeline is handed over in memory, so that random weights of any size will do.
"""
