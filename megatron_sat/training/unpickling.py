"""Whether a file of DeepSpeed's may be unpickled.

DeepSpeed opens its ``.pt`` files with Python's full unpickling, which calls whatever function a
file names. A manifest does not help: who can write such a file can write its manifest. So before
DeepSpeed sees a file, it must be what `torch.save` makes of a training state and nothing besides,
name no function or class but torch's own for tensors and those of `KNOWN_GLOBALS`, and open under
torch's restricted unpickler, which goes through the same instructions without being able to call
anything else.
"""

import contextlib
import pickle
import pickletools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

KNOWN_GLOBALS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What optimizer states of DeepSpeed 0.19 hold beside tensors and plain values."""
_PICKLE = "data.pkl"
_RECORDS = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)
_PROTOCOL = 2  # torch.save's
_registry = threading.Lock()


def fault_of_pickle(path: Path) -> str | None:
    """Why the file must not be unpickled, as "names os.system, ..."; None if it may. Runs nothing
    of it, reads none of its tensors and never raises for what lies on disk; OSError where the disk
    cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return "is not in the zip format of torch.save"
        reader = torch._C.PyTorchFileReader(str(path))
        seen: set[str] = set()
        for record in reader.get_all_records():
            if record in seen or not _RECORDS.fullmatch(record):
                twice = " twice" if record in seen else ""
                return f"holds {record!r}{twice}, which torch.save does not write"
            seen.add(record)
        content: bytes = reader.get_record(_PICKLE)
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "PROTO" and argument != _PROTOCOL:
                return f"is pickled with protocol {argument}, not {_PROTOCOL} as torch.save does"
        with known_globals():
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                names = ", ".join(sorted(unsafe))
                return f"names {names}, which could run code; valid are tensors and plain values"
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"cannot be opened ({error.strerror})"
    except OSError:
        raise
    except Exception as error:  # torch raises whatever the file provokes
        return f"cannot be opened as DeepSpeed's file ({reason(error)})"
    return None


@contextlib.contextmanager
def known_globals() -> Iterator[None]:
    """Within the block torch's restricted unpickler takes `KNOWN_GLOBALS` and none besides: what
    other packages have registered, as Megatron-core does for files of its own, does not count."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with _registry:  # torch has one list for all threads
        registered = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(registered)


def reason(error: Exception) -> str:
    """The first sentence of an error of torch's. They go on with advice, such as to trust it."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"Unsupported \w+.*|Trying to .*|Can only .*", text)
        text = text if found is None else found[0]
    first = (text.splitlines() or [type(error).__name__])[0]
    return first.partition(". ")[0]
