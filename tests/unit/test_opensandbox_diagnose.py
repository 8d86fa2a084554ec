"""What the service or execd says → the error of ours that tells what to do."""

from __future__ import annotations

import pytest

from cloche._kit.http import (
    ConnectFailure,
    ConnectionLost,
    HttpFailure,
    NotAllowed,
    TimedOut,
    TlsFailure,
    TooLarge,
)
from cloche.backends.opensandbox import address, diagnose
from cloche.backends.opensandbox.client import Refused
from cloche.backends.opensandbox.facts import Refusal

PLACE = address.api("https://user:hush@box.example:8443/v1")


@pytest.mark.parametrize(
    ("status", "code", "kind", "retryable", "hint"),
    [
        (401, "INVALID_API_KEY", "permission-denied", False, "CLOCHE_OPENSANDBOX_API_KEY"),
        (401, "MISSING_API_KEY", "permission-denied", False, "CLOCHE_OPENSANDBOX_API_KEY"),
        (401, "", "permission-denied", False, "CLOCHE_OPENSANDBOX_API_KEY"),
        (403, "", "permission-denied", False, "CLOCHE_OPENSANDBOX_API_KEY"),
        (403, "KUBERNETES::QUOTA_EXCEEDED", "quota-exceeded", True, "quota"),
        (403, "kubernetes::quota_exceeded", "quota-exceeded", True, "quota"),
        (429, "", "quota-exceeded", True, "Wait"),
        (429, "POOL::BUSY", "quota-exceeded", True, "Wait"),
        (503, "POOL::CAPACITY_EXHAUSTED", "quota-exceeded", True, "Wait"),
        (400, "X::QUOTA", "quota-exceeded", True, "Wait"),
        (500, "DOCKER::SANDBOX_IMAGE_PULL_FAILED", "image-unavailable", False, "CLOCHE_IMAGE"),
        (500, "docker::sandbox_image_pull_failed", "image-unavailable", False, "CLOCHE_IMAGE"),
        (504, "KUBERNETES::POD_READY_TIMEOUT", "start-timeout", True, "CLOCHE_START_TIMEOUT"),
        (400, "SANDBOX::INVALID_PARAMETER", "backend-unavailable", False, "limits"),
        (422, "", "backend-unavailable", False, "limits"),
        (404, "DOCKER::SANDBOX_NOT_FOUND", "backend-unavailable", False, "log"),
        (409, "", "backend-unavailable", False, "log"),
        (418, "", "backend-unavailable", False, "log"),
        (500, "", "backend-unavailable", False, "log"),
        (500, "DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED", "backend-unavailable", False, "log"),
        (502, "", "backend-unavailable", True, "log"),
        (503, "DOCKER::SANDBOX_EXECD_START_FAILED", "backend-unavailable", True, "log"),
        (504, "", "backend-unavailable", True, "log"),
    ],
)
def test_refusal(status: int, code: str, kind: str, hint: str, *, retryable: bool) -> None:
    """Each no of a service is a typed error with its words, its number and the request, and a hint for this one."""
    error = diagnose.refusal(Refused(Refusal(status, code, "the words", "req-7")), "make a sandbox")
    assert (error.code, error.retryable) == (kind, retryable)
    assert (
        error.message == f"The OpenSandbox service does not make a sandbox: the words (status {status}, request req-7)."
    )
    assert hint in error.hint


def test_refusal_without_words() -> None:
    """Without a message the code is told, and without both that there was none."""
    assert "X::Y (status 500)" in diagnose.refusal(Refused(Refusal(500, "X::Y")), "make a sandbox").message
    assert "no message (status 500)" in diagnose.refusal(Refused(Refusal(500)), "make a sandbox").message


@pytest.mark.parametrize(
    ("exc", "said", "retryable", "hint"),
    [
        (TlsFailure("self-signed certificate"), "TLS: self-signed certificate.", False, "SSL_CERT_FILE"),
        (ConnectFailure("Connection refused", 111), "be reached at", True, "CLOCHE_OPENSANDBOX_API_URL"),
        (TimedOut("no answer in time"), "did not make a sandbox in time.", True, "load"),
        (
            TooLarge("The answer is too large."),
            "did not make a sandbox: The answer is too large.",
            False,
            "CLOCHE_MODE",
        ),
        (ConnectionLost("it broke"), "did not make a sandbox: it broke.", True, "CLOCHE_OPENSANDBOX_API_URL"),
        (HttpFailure("strange"), "did not make a sandbox: strange.", True, "CLOCHE_OPENSANDBOX_API_URL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, HttpFailure) else "",
)
def test_unreachable(exc: HttpFailure, said: str, hint: str, *, retryable: bool) -> None:
    """A service that cannot be spoken to is unavailable, told by its address without a password, and tried again where that may
    help.
    """
    error = diagnose.unreachable(exc, PLACE, "make a sandbox")
    assert (error.code, error.retryable) == ("backend-unavailable", retryable)
    assert said in error.message
    assert "https://box.example:8443" in error.message
    assert "hush" not in str(error)
    assert hint in error.hint


def test_not_allowed() -> None:
    """An address where we do not go is told with both settings that would have us go there, and is not tried again."""
    error = diagnose.not_allowed(NotAllowed("metadata.example", "169.254.169.254"))
    assert (error.code, error.retryable) == ("permission-denied", False)
    assert "metadata.example (169.254.169.254)" in error.message
    for word in ("CLOCHE_SSRF_WHITELIST (metadata.example)", "CLOCHE_OPENSANDBOX_SERVER_PROXY=true", diagnose.DOCS):
        assert word in error.hint
