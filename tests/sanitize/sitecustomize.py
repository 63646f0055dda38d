"""Run by every Python that scripts/sanitize.sh starts: no limit on addresses, as sanitizers map terabytes of them."""

import resource

_limit = resource.setrlimit


def _but_not_addresses(what: int, limits: tuple[int, int]) -> None:
    if what != resource.RLIMIT_AS:
        _limit(what, limits)


resource.setrlimit = _but_not_addresses
