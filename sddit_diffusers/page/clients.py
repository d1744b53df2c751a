"""Who uses the page, and how much of it."""

import os
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse

_CALLS = 4  # of one client, waiting or under way
_PATIENCE = 10.0  # seconds in which somebody must begin to read a call's answer


class Clients:
    """Who uses the page: one has a few calls at a time, and a call whose answer nobody reads is let go.

    gradio itself keeps the calls of whoever posts them, and what a session is called is the client's choice.
    """

    def __init__(self, queue):
        self.queue, self._push = queue, queue.push
        self.reading = Counter()  # sessions and events, by the answers that are being read
        queue.push = self.push

    def _waiting(self) -> list:
        return [
            event for queue in self.queue.event_queue_per_concurrency_id.values() for event in queue.queue
        ]

    def _under_way(self) -> list:
        return [event for job in self.queue.active_jobs if job for event in job]

    def _is_abandoned(self, event) -> bool:
        read = event.session_hash in self.reading or event._id in self.reading
        return not read and time.monotonic() - event.enqueue_time > _PATIENCE

    def has_left(self, session: str) -> bool:
        """Whether nobody reads the answer of this page's call, which is under way."""
        calls = [event for event in self._under_way() if event.session_hash == session]
        return bool(calls) and all(map(self._is_abandoned, calls))

    async def push(self, body, request, username) -> tuple:
        """As of gradio's queue, whose places those take who wait for them."""
        for event in filter(self._is_abandoned, self._waiting()):
            await self.queue.clean_events(event_id=event._id)
        address = _address(request)
        calls = [
            event
            for event in self._waiting() + self._under_way()
            if event.session_hash == body.session_hash or _address(event.request) == address
        ]
        if len(calls) >= _CALLS:
            return False, f"You have {len(calls)} calls here; wait for their end.", "queue_full"
        return await self._push(body=body, request=request, username=username)

    def around(self, app: Callable) -> Callable:
        """The web application, which takes no files and notes what is being read."""

        async def answer(scope: dict, receive: Callable, send: Callable) -> None:
            path = scope.get("path", "").rstrip("/")
            if path.endswith("/upload"):
                await PlainTextResponse("This page takes no files.", 403)(scope, receive, send)
                return
            session = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[0]
            reads = path.endswith("/queue/data") or "/call/" in path and scope.get("method") == "GET"
            key = session if path.endswith("/queue/data") else path.rpartition("/")[2]
            self.reading[key] += reads
            try:
                await app(scope, receive, send)
            finally:
                self.reading[key] -= reads
                self.reading += Counter()  # forgets what is read no longer

        return answer


def _address(request) -> str:
    """Of who asks. A Space is behind a proxy, which puts that last."""
    forwarded = request.headers.get("x-forwarded-for", "") if "SPACE_ID" in os.environ else ""
    return forwarded.split(",")[-1].strip() or (request.client.host if request.client else "")
