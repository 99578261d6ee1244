"""A process for one object of the user's: `python -m verst.isolated.worker SOCKET_FD PARENT_PID`.

First comes what opens it (`verst.isolated.call.Opens`), then the arguments of one call after another.
"""

from __future__ import annotations

from functools import partial

from verst.errors import VerstError
from verst.extend import origin
from verst.isolated.served import Channel, attempt

_ERROR_CHARS = 500


def serve(channel: Channel) -> None:
    """Loads the object, says so, then answers calls. Returns when the parent closes the socket."""
    call, error = attempt(channel.receive().open)
    if error is not None:
        channel.send_unloaded(error)
        return
    channel.send(loaded=True)
    while (arguments := channel.receive()) is not None:
        value, error = attempt(partial(call, *arguments))
        if error is None:
            channel.send(value=value)
        else:
            channel.send(error=(str(error) if isinstance(error, VerstError) else f"raised {origin(error)}")[:_ERROR_CHARS])


if __name__ == "__main__":
    serve(Channel.open())
