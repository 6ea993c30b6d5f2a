"""HiGHS through MathOpt on a program in its protocol buffer, which is filled from arrays."""

from __future__ import annotations

from ortools.math_opt import callback_pb2, model_parameters_pb2, model_pb2, parameters_pb2, result_pb2
from ortools.math_opt.core.python import solver as mathopt
from pybind11_abseil.status import StatusNotOk

HIGHS = parameters_pb2.SOLVER_TYPE_HIGHS


def run_highs(program: model_pb2.ModelProto, params: parameters_pb2.SolveParametersProto) -> result_pb2.SolveResultProto:
    """The answer; where HiGHS ends with an error of its own, as now and then happens behind its presolve, that without presolve.

    Raises StatusNotOk if that fails, too. ``params`` may be changed.
    """
    try:
        return _run(program, params)
    except StatusNotOk:
        params.presolve = parameters_pb2.EMPHASIS_OFF
        return _run(program, params)


def _run(program: model_pb2.ModelProto, params: parameters_pb2.SolveParametersProto) -> result_pb2.SolveResultProto:
    nothing, options = callback_pb2.CallbackRegistrationProto(), model_parameters_pb2.ModelSolveParametersProto()
    return mathopt.solve(program, HIGHS, parameters_pb2.SolverInitializerProto(), params, options, None, nothing, None, None)
