"""opweave: operator-level auto-parallelization compiler for PyTorch.

    import opweave as ow
    step = ow.compile(model, ow.Cluster.detect(), optimizer=torch.optim.AdamW(model.parameters()))
    loss = step(batch)
"""

from .compiler.api import Plan, TrainingStep, VerifyReport, compile, plan, verify
from .compiler.capture_errors import CaptureError
from .compiler.plan import PlanError
from .compiler.planner import DoesNotFitError
from .compiler.rule import RuleError
from .compiler.rule_table import pattern
from .compiler.training_step import NonFiniteLossError, StepError
from .compiler.verify import VerificationError
from .cost_model.cluster import Cluster, ClusterError

__version__ = "0.1.0"

__all__ = [
    "CaptureError", "Cluster", "ClusterError", "DoesNotFitError", "NonFiniteLossError", "Plan", "PlanError", "RuleError", "StepError",
    "TrainingStep", "VerificationError", "VerifyReport", "__version__", "compile", "pattern", "plan", "verify",
]  # fmt: skip
