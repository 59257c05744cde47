"""What a failure of Ray Train means: a fault that the user can mend, or one line on what broke."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sft.errors import RaysftError, TrainingError


def user_fault(errors: Iterable[BaseException]) -> RaysftError | None:
    """The first fault of our own tree in these errors or in what caused them."""
    for error in errors:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RaysftError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def failures(error: Exception) -> list[BaseException]:
    """What lies inside Ray Train's error, and at last the error itself."""
    workers: list[BaseException] = list(getattr(error, "worker_failures", {}).values())
    controller = getattr(error, "controller_failure", None)
    return [*workers, *([controller] if controller else []), error]


def translated(error: Exception, what: str) -> RaysftError:
    """The user's own fault if one is inside the error, else one line with the last words of what broke."""
    inside = failures(error)
    fault = user_fault(inside)
    if fault is not None:
        return fault
    last = inside[0]
    words = next((line for line in reversed(str(last).strip().splitlines()) if line.strip()), type(last).__name__)
    return TrainingError(f"{what}: {words.strip()} ({type(last).__name__}; the worker logs have the whole story)")


@contextmanager
def translating(what: str) -> Iterator[None]:
    """Raises what fails inside as `translated` says it.

    Raises:
        RaysftError: something failed.
    """
    try:
        yield
    except RaysftError:
        raise
    except Exception as error:
        raise translated(error, what) from None


def stop_at_faults() -> Any:
    """A callback for Ray Train's controller that ends a run at a fault of the user's.

    A lost node is worth another try. A loss that is no number, a full disk or a foreign checkpoint would be met again
    by every new group of workers, however many restarts are allowed.
    """
    from ray.train import UserCallback

    class StopAtFaults(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            fault = user_fault(worker_exceptions.values())
            if fault is not None:
                raise fault

    return StopAtFaults()
