"""The settings of a server, checked before anything starts. The defaults are safe on a shared machine."""

from __future__ import annotations

import dataclasses
import ipaddress
import math

from smolforge.errors import BadInput

KEY_VARIABLE = "SMOLFORGE_API_KEY"
_AT_LEAST_ONE = ("max_batch", "max_queue", "max_per_client", "max_sequences", "max_n", "max_body")
_ABOVE_ZERO = ("request_seconds", "body_seconds")
_NOT_BELOW_ZERO = ("drain_seconds", "follow_seconds")


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Settings of one server; BadInput where one is wrong, or where the server would be open to everyone."""

    model: str  # a run, a checkpoint, a Hugging Face directory or a Hub id
    host: str = "127.0.0.1"  # address to bind; other than loopback needs `api_key` or `allow_public`
    port: int = 8000  # 0 takes a free one
    api_key: str | None = None  # that clients must send, or several with commas between them; the page asks for one
    allow_public: bool = False  # serve a public address without a key
    root_path: str = ""  # prefix under which a reverse proxy serves this, such as /llm; requests may have it or not
    # Reverse proxies whose X-Forwarded-For and -Proto are believed: addresses, networks with commas between, or *.
    forwarded_allow_ips: str = ""
    cors_origins: tuple[str, ...] = ()  # other web origins whose scripts may call the API
    name: str | None = None  # of the model in the API; that of the directory or Hub repository unless given
    quantize: str = "auto"  # like `draft` and `adapter` as in `Engine.from_pretrained`
    draft: str | None = None
    adapter: str | None = None
    max_batch: int = 16  # sequences that run at once
    max_queue: int = 256  # sequences that can wait; further ones get 429
    max_per_client: int = 64  # unfinished requests of one client: of a key where there are several, else of an address
    max_sequences: int = 128  # prompts × n of one request
    max_n: int = 16  # choices per prompt
    max_body: int = 512 << 10  # bytes of a request body
    request_seconds: float = 600.0  # a request that takes longer ends with an error
    body_seconds: float = 30.0  # a body that takes longer to arrive is refused
    drain_seconds: float = 10.0  # for running requests to finish after SIGTERM
    follow_seconds: float = 2.0  # between two looks for a run's newer checkpoint; 0 keeps the first one
    page: bool = True  # serve the page at /

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise BadInput(f"{self.port} is not a port", field="port", hint="Ports go from 0 (any free one) to 65535.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise BadInput(f"must be at least 1, not {getattr(self, name)}", field=name)
        for name in (*_ABOVE_ZERO, *_NOT_BELOW_ZERO):
            value, least = getattr(self, name), name in _NOT_BELOW_ZERO
            if not (math.isfinite(value) and (value >= 0 if least else value > 0)):
                raise BadInput(f"must be {'at least' if least else 'above'} 0, not {value}", field=name)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            hint = "Give a path such as /llm, with / only at its beginning."
            raise BadInput(f"{self.root_path!r} is not a prefix", field="root-path", hint=hint)
        if self.api_key is not None and not all(self.keys):
            raise BadInput("a key is empty", field="api-key", hint=f"Give a key, in {KEY_VARIABLE} or with --api-key.")
        for proxy in self.forwarded_allow_ips.split(",") if self.forwarded_allow_ips not in ("", "*") else ():
            try:
                ipaddress.ip_network(proxy.strip())
            except ValueError as error:
                hint = "Give addresses such as 127.0.0.1 or networks such as 10.0.0.0/8, with commas between them."
                raise BadInput(str(error), field="forwarded-allow-ips", hint=hint) from None
        if "*" in self.cors_origins and self.api_key is None:
            hint = "Name the origins, or protect the server with --api-key."
            raise BadInput("'*' lets every web page use this server", field="cors-origin", hint=hint)
        if not self.loopback and not self.api_key and not self.allow_public:
            hint = f"Give --api-key KEY (or {KEY_VARIABLE}), or --allow-public to serve everyone."
            problem = f"{self.host} can be reached from other machines, and there is no key"
            raise BadInput(problem, field="host", hint=hint)

    @property
    def keys(self) -> list[str]:
        """The keys of `api_key`."""
        return [key.strip() for key in self.api_key.split(",")] if self.api_key is not None else []

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
