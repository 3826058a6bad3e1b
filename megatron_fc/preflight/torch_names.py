"""A stand-in for torch that has its names alone: with it Megatron parses and checks arguments in a second, not five.

`megatron-fc plan` and `topology` compute nothing with torch. Megatron's modules import it for classes to derive from,
decorators, types and dtypes, and these the stand-in has. Whatever would compute something raises `NeedsTorch` once the
modules are imported, and the command starts again with torch itself, as it does on every refusal (`with_names`).
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

_STAND_INS = ("torch", "triton", "fsspec", "tensorboard")
_ASKED_FOR = "MEGATRON_FC_TORCH"  # set by a command that starts again
_IMPORTING = "<frozen importlib._bootstrap>"
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1, "int64": 8}
_SAME = {"float": "float32", "half": "float16", "double": "float64", "long": "int64"}
# What the CPU lane answers, and torch without a GPU (`megatron_fc.training.cpu_lane`).
_ANSWERS: dict[str, Any] = {
    "torch.cuda.is_available": False,
    "torch.cuda.device_count": 1,
    "torch.cuda.get_device_capability": (8, 0),
    "torch.cuda.get_device_properties": types.SimpleNamespace(name="cpu", major=8, minor=0),
    "torch.device": "cpu",
    "torch.is_grad_enabled": True,
    "torch.distributed.is_initialized": False,
    "torch.distributed.is_available": True,
}


class NeedsTorch(Exception):
    """Something would have to be computed, which names cannot."""


def with_names(run: Callable[[], int], *, is_process: bool) -> int:
    """Run a command on names alone, if it is all that its process does, and else on torch.

    Whatever goes wrong starts the process again with torch: what it refuses, torch and Megatron have refused.
    """
    if not is_process or "torch" in sys.modules or os.environ.get(_ASKED_FOR):
        from megatron_fc.training import cpu_lane

        cpu_lane.install()
        return run()
    sys.meta_path.insert(0, _Finder())
    try:
        return run()
    except BrokenPipeError:
        raise
    except Exception:
        words = [sys.executable, "-m", "megatron_fc", *sys.argv[1:]]
        os.execve(sys.executable, words, {**os.environ, _ASKED_FOR: "1"})


class _Derived:
    """What a class of the stand-in is to the classes that derive from it."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Take the arguments of any class."""


class _Name:
    """A name of torch's: an attribute has attributes, a decorator returns what it decorates."""

    _path: str

    def __init__(self, path: str) -> None:
        module, _, name = path.rpartition(".")
        self.__dict__.update(_path=path, __name__=name, __qualname__=name, __module__=module, __doc__=None)

    def __getattr__(self, name: str) -> "_Name":
        if name.startswith("__") and name != "__get__":
            raise AttributeError(name)
        made = _named(f"{self._path}.{name}")
        self.__dict__[name] = made
        return made

    def __call__(self, *args: Any, **_: Any) -> Any:
        if self._path in _ANSWERS:
            return _ANSWERS[self._path]
        _only_while_importing(self._path)
        is_decorator = len(args) == 1 and callable(args[0]) and not isinstance(args[0], _Name)
        return args[0] if is_decorator else _Name(f"{self._path}()")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        is_first = next(base for base in bases if isinstance(base, _Name)) is self
        return (_Derived,) if is_first else ()

    def __instancecheck__(self, one: object) -> bool:
        return self._path == "torch.dtype" and isinstance(one, _Name) and "itemsize" in one.__dict__

    def __deepcopy__(self, _: object) -> "_Name":
        return self

    def __subclasscheck__(self, _: type) -> bool:
        return False

    def __or__(self, _: object) -> "_Name":
        return self

    __ror__ = __getitem__ = __or__

    def __bool__(self) -> bool:
        _only_while_importing(self._path)
        return False

    def __lt__(self, _: object) -> bool:
        _only_while_importing(self._path)
        return False

    __gt__ = __le__ = __ge__ = __lt__

    def __iter__(self) -> Any:
        _only_while_importing(self._path)
        return iter(())

    def __enter__(self) -> "_Name":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was entered."""

    def __repr__(self) -> str:
        return self._path


def _named(path: str) -> _Name:
    made = _Name(path)
    if path.removeprefix("torch.") in _BYTES:
        made.__dict__["itemsize"] = _BYTES[path.removeprefix("torch.")]
    return made


def _only_while_importing(path: str) -> None:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return
        frame = frame.f_back
    _refuse(path)


def _refuse(path: str) -> NoReturn:
    raise NeedsTorch(path)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "torch" and name in _SAME:
            return getattr(self, _SAME[name])
        path = f"{self.__name__}.{name}"
        found = sys.modules.get(path) or _named(path)
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""
