"""Row kernels for CPU: rows_cpu.cpp, compiled at first use by torch's extension loader and kept in
the user's cache.

Legend: C rows, v columns.  Importing this module compiles; ValueError says what is missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mtopd.kernels.rows import Kind, LogitTransform, Mixture, Row, RowProblem, Statistic

_SOURCE = Path(__file__).with_name("rows_cpu.cpp")
# Named instruction sets, not "native": the cache folder may be shared by machines that differ.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("rows", "columns", "student_stride", "teacher_stride")
    ]


class _Model(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("bias", ctypes.c_void_p)]


class _Mixture(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in Mixture._fields]


class CpuRows:
    NAME = "cpu"
    DEVICES = ("cpu",)

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        self._statistics = library["mtopd_statistics"]
        self._merge = library["mtopd_merge"]
        self._gradient = library["mtopd_gradient"]
        common = [_Shape, _Model, _Model, ctypes.c_float]
        self._statistics.argtypes = [pointer, pointer, *common, pointer, ctypes.c_int]
        gradient_arguments = [ctypes.c_int, _Mixture, pointer, pointer, pointer, ctypes.c_int]
        self._gradient.argtypes = [pointer, pointer, pointer, *common, *gradient_arguments]
        number = ctypes.c_double
        size = ctypes.c_int64
        self._merge.argtypes = [pointer, pointer, size, size, number, number, ctypes.c_int, pointer]
        for function in (self._statistics, self._merge, self._gradient):
            function.restype = None

    def statistics(self, problem: RowProblem, student_Cv: Tensor, teacher_Cv: Tensor) -> Tensor:
        statistics_9C = torch.empty(len(Statistic), student_Cv.shape[0])
        self._statistics(
            student_Cv.data_ptr(),
            teacher_Cv.data_ptr(),
            _shape(student_Cv, teacher_Cv),
            _model(problem.student),
            _model(problem.teacher),
            1 / problem.temperature,
            statistics_9C.data_ptr(),
            torch.get_num_threads(),
        )
        return statistics_9C

    def merge(self, problem: RowProblem, statistics_R9C: Tensor, token_weight_C: Tensor) -> Tensor:
        statistics_R9C = statistics_R9C.contiguous()
        token_weight_C = token_weight_C.float().contiguous()
        rows_9C = torch.empty(len(Row), statistics_R9C.shape[2])
        self._merge(
            statistics_R9C.data_ptr(),
            token_weight_C.data_ptr(),
            len(statistics_R9C),
            statistics_R9C.shape[2],
            problem.temperature,
            problem.student.scale / problem.temperature,
            problem.kind == Kind.REVERSE_KL,
            rows_9C.data_ptr(),
        )
        return rows_9C

    def gradient(
        self,
        problem: RowProblem,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
        rows_9C: Tensor,
        out_Cv: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert out_Cv is None or out_Cv.data_ptr() == student_Cv.data_ptr(), (
            "the gradient is made in place"
        )
        assert rows_9C.is_contiguous()
        value_C, mean_C = torch.empty(2, student_Cv.shape[0])
        self._gradient(
            student_Cv.data_ptr(),
            teacher_Cv.data_ptr(),
            None if out_Cv is None else out_Cv.data_ptr(),
            _shape(student_Cv, teacher_Cv),
            _model(problem.student),
            _model(problem.teacher),
            1 / problem.temperature,
            int(problem.kind),
            _Mixture(*problem.mixture),
            rows_9C.data_ptr(),
            value_C.data_ptr(),
            mean_C.data_ptr(),
            torch.get_num_threads(),
        )
        return value_C, mean_C


def _shape(student_Cv: Tensor, teacher_Cv: Tensor) -> _Shape:
    assert (
        student_Cv.dtype == teacher_Cv.dtype == torch.float32
        and student_Cv.shape == teacher_Cv.shape
    )
    assert student_Cv.stride(1) == teacher_Cv.stride(1) == 1
    return _Shape(*student_Cv.shape, student_Cv.stride(0), teacher_Cv.stride(0))


def _model(transform: LogitTransform) -> _Model:
    bias = transform.bias_v
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    return _Model(
        transform.scale, transform.softcap or 0.0, None if bias is None else bias.data_ptr()
    )


def _library() -> ctypes.CDLL:
    """Compile once per source, compiler flags and torch version; processes wait for each other, and
    the operating system releases the lock of a dead one.
    """
    flags = [
        "-O3",
        "-fopenmp",
        "-Wno-psabi",
        *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), []),
    ]
    key = hashlib.sha256(
        repr((_SOURCE.read_bytes(), flags, torch.__version__, platform.machine())).encode()
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtopd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / f"rows_cpu_{key.hexdigest()[:16]}.so"
        # It appears whole, by a rename: only a process that builds it needs the lock.
        if (found := _load(library)) is None:
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (found := _load(library)) is None:
                    with tempfile.TemporaryDirectory(dir=folder) as build_dir:
                        built = _compile(flags, build_dir)
                        with open(built, "rb") as file:
                            os.fsync(file.fileno())  # its name must not outlive its bytes
                        os.replace(built, library)
                    found = ctypes.CDLL(str(library))
        return found
    except OSError as error:
        raise ValueError(
            f"the compiled CPU row kernels cannot be kept in {folder}: {error}"
        ) from error


def _load(library: Path) -> ctypes.CDLL | None:
    """None where it is missing or damaged, and has to be built."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _compile(flags: list[str], build_dir: str) -> Path:
    import torch.utils.cpp_extension as extension

    try:
        extension.load(
            "rows_cpu",
            [str(_SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=build_dir,
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        lines = str(error).splitlines()
        reason = next(
            (line for line in lines if re.search(r"error:|not found|required", line)), lines[0]
        )
        raise ValueError(
            f"the CPU row kernels cannot be compiled ({reason.strip()}); a C++ compiler and ninja "
            "are needed"
        ) from error
    (library,) = Path(build_dir).glob("*.so")  # the loader numbers a second one of a process
    return library


KERNELS = CpuRows(_library())
