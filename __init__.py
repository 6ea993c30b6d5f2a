"""opweave: operator-level auto-parallelization compiler for PyTorch.

    import opweave as ow
    step = ow.compile(model, ow.Cluster.detect(), optimizer=torch.optim.AdamW(model.parameters()))
    loss = step(batch)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.api import Plan, TrainingStep, VerifyReport, compile, plan, verify
    from .compiler.capture_errors import CaptureError
    from .compiler.plan import PlanError
    from .compiler.planner import DoesNotFitError
    from .compiler.rule import RuleError
    from .compiler.rule_table import pattern
    from .compiler.suggestions import Diagnosis, what_would_fit
    from .compiler.training_step import NonFiniteLossError, StepError
    from .compiler.verify import VerificationError
    from .cost_model.cluster import Cluster, ClusterError

__version__ = "0.1.0"

# Public name → where it lives. Looked up at first use: the command line answers `--help` without loading torch.
_HOME = {
    **dict.fromkeys(("Plan", "TrainingStep", "VerifyReport", "compile", "plan", "verify"), ".compiler.api"),
    "CaptureError": ".compiler.capture_errors",
    "PlanError": ".compiler.plan",
    "DoesNotFitError": ".compiler.planner",
    "RuleError": ".compiler.rule",
    "pattern": ".compiler.rule_table",
    **dict.fromkeys(("Diagnosis", "what_would_fit"), ".compiler.suggestions"),
    **dict.fromkeys(("NonFiniteLossError", "StepError"), ".compiler.training_step"),
    "VerificationError": ".compiler.verify",
    **dict.fromkeys(("Cluster", "ClusterError"), ".cost_model.cluster"),
}

__all__ = [
    "CaptureError", "Cluster", "ClusterError", "Diagnosis", "DoesNotFitError", "NonFiniteLossError", "Plan", "PlanError", "RuleError",
    "StepError", "TrainingStep", "VerificationError", "VerifyReport", "__version__", "compile", "pattern", "plan", "verify",
    "what_would_fit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module 'opweave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
