"""The rules for answers: well-formed, expected, and with errors that are problem documents."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import h11
from werkzeug.exceptions import default_exceptions
from wsproto.frame_protocol import FrameProtocol, Opcode, ParseFailed

from inferno.errors import InfernoError
from inferno.testing.processes import ROOT
from tests.fuzz.case import Case, Ending
from tests.fuzz.wire import Exchange

#: Server errors that are documented: not supported, unavailable, not in time, not this version.
DOCUMENTED = {501, 503, 504, 505}
#: Members of the health routes' documents, which are no problems even if the platform has one.
HEALTH = {"missing", "workers_active", "ready"}
#: What the server says on a conversation's socket.
SAID = {"accepted", "result", "error", "cancelled", "pong", "timeout"}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _codes(kind: type[InfernoError]) -> set[str]:
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


def _documented() -> set[str]:
    _, _, section = (ROOT / "docs" / "api.md").read_text().partition("\n## Errors\n")
    return set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", section.partition("\n## ")[0]))


#: Every code that a problem may have: the platform's, the documented ones, and the names of HTTP's
#: own errors.
CODES = (
    _codes(InfernoError)
    | _documented()
    | {str(error().name).lower().replace(" ", "_") for error in default_exceptions.values()}
)


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    media_type: str
    body: bytes
    #: Method of the request; an answer to HEAD has no body.
    method: str


class Malformed(Exception):
    """What came back is no HTTP."""


def read_answers(received: bytes, methods: Sequence[str]) -> tuple[list[Answer], bytes]:
    """Return the complete answers, and the bytes behind them.

    Args:
      received: what came on a connection.
      methods: methods of its requests; a further answer is read as one to a GET.
    Raises:
      Malformed: the bytes are no HTTP.
    """
    answers: list[Answer] = []
    while received:
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        answer, left = _read_answer(received, method)
        if answer is None:
            break
        answers.append(answer)
        received = left
    return answers, received


def _read_answer(received: bytes, method: str) -> tuple[Answer | None, bytes]:
    connection = h11.Connection(h11.CLIENT)
    asked = "HEAD" if method == "HEAD" else "GET"
    connection.send(h11.Request(method=asked, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(received)
    head: h11.Response | None = None
    body = bytearray()
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as exc:
            raise Malformed(f"{exc}: {received[:200]!r}") from None
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            media_type = dict(head.headers).get(b"content-type", b"").partition(b";")[0]
            answer = Answer(head.status_code, media_type.decode("latin-1"), bytes(body), method)
            return answer, connection.trailing_data[0]
        elif not isinstance(event, h11.InformationalResponse):
            return None, received


def is_socket(case: Case, received: bytes) -> bool:
    """Return whether the server speaks WebSocket from here on."""
    return case.socket and received.removeprefix(_CONTINUE).startswith(b"HTTP/1.1 101 ")


def is_complete(case: Case, received: bytes) -> bool:
    """Return whether everything came back that is waited for."""
    if is_socket(case, received):
        try:
            return case.survives and _has_last_pong(read_messages(received))
        except Malformed:
            return True
    if case.socket:
        case = Case(case.kind, case.pieces[:1], case.methods)
    try:
        answers, _ = read_answers(received, case.methods)
    except Malformed:
        return True
    return len(answers) >= len(case.methods)


def faults(case: Case, exchange: Exchange) -> list[str]:
    """Return what is wrong with what a case brought."""
    if case.ending is Ending.RESET:
        return []
    found = []
    if exchange.hung:
        found.append("no answer and no end of the connection")
    elif case.closes and not exchange.closed:
        found.append("the connection stays open")
    if is_socket(case, exchange.received):
        return found + _socket_faults(case, exchange)
    return found + _http_faults(case, exchange)


def _http_faults(case: Case, exchange: Exchange) -> list[str]:
    try:
        answers, rest = read_answers(exchange.received, case.methods)
    except Malformed as exc:
        return [f"malformed answer: {exc}"]
    found = [fault for answer in answers for fault in answer_faults(answer)]
    if len(answers) > len(case.methods):
        found.append(f"answered {len(answers)} requests in place of {len(case.methods)}")
    if rest and exchange.closed:
        found.append(f"answer cut off: {rest[:100]!r}")
    if case.refused and answers and answers[0].status < 400:
        found.append(f"accepted with {answers[0].status}")
    if case.socket and case.survives:
        found.append("socket refused")
    return found


def answer_faults(answer: Answer) -> list[str]:
    """Return what is wrong with one answer."""
    found = []
    if answer.status >= 500 and answer.status not in DOCUMENTED:
        found.append(f"status {answer.status}: {answer.body[:300]!r}")
    if answer.status >= 400 and answer.method != "HEAD":
        problem = _object(answer.body)
        if "application/" not in answer.media_type or problem is None:
            found.append(f"{answer.status} is no problem document: {answer.body[:100]!r}")
        elif problem.get("code") not in CODES and not problem.keys() & HEALTH:
            found.append(f"unknown code {problem.get('code')!r}")
    return found


def read_messages(received: bytes) -> list[tuple[int, bytes]]:
    """Return opcode and content of each whole message or control frame on a socket.

    Raises:
      Malformed: the bytes are no frames.
    """
    protocol = FrameProtocol(client=True, extensions=[])
    _, _, rest = received.removeprefix(_CONTINUE).partition(b"\r\n\r\n")
    protocol.receive_bytes(rest)
    messages: list[tuple[int, bytes]] = []
    content = b""
    try:
        for frame in protocol.received_frames():
            if frame.opcode is Opcode.CLOSE:
                return [*messages, (int(frame.opcode), b"")]
            if frame.opcode.iscontrol():
                messages.append((int(frame.opcode), b""))
                continue
            part = frame.payload
            content += part.encode() if isinstance(part, str) else bytes(cast(bytearray, part))
            if frame.message_finished:
                messages.append((int(frame.opcode), content))
                content = b""
    except ParseFailed as exc:
        raise Malformed(str(exc)) from None
    return messages


def _socket_faults(case: Case, exchange: Exchange) -> list[str]:
    try:
        messages = read_messages(exchange.received)
    except Malformed as exc:
        return [f"malformed frame: {exc}"]
    found = []
    for opcode, content in messages:
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            said = _object(content)
            if said is None or said.get("type") not in SAID:
                found.append(f"unknown message {content[:100]!r}")
            elif said["type"] == "error" and "code" in said["data"]:
                problem = json.dumps(said["data"]).encode()
                found += answer_faults(Answer(said["data"]["status"], "application/", problem, ""))
    if case.survives and not _has_last_pong(messages):
        found.append("the socket does not answer any more")
    return found


def _has_last_pong(messages: Sequence[tuple[int, bytes]]) -> bool:
    return any(b'"pong"' in content and b'"last"' in content for _, content in messages)


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
