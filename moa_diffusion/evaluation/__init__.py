"""Models on the same prompts and seeds: drawn, scored, kept, each output and score once."""

from moa_diffusion.evaluation.candidates import Candidate, candidates
from moa_diffusion.evaluation.errors import EvaluationError
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.plan import EvaluationPlan, plan_evaluation
from moa_diffusion.evaluation.records import Sample, ScoredSamples
from moa_diffusion.evaluation.write import write_results

__all__ = [
    "Candidate",
    "EvaluationError",
    "EvaluationPlan",
    "Sample",
    "ScoredSamples",
    "candidates",
    "evaluate",
    "plan_evaluation",
    "write_results",
]
