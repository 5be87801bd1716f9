"""Integer arithmetic on the host: ``triton.cdiv`` is a compile-time function and takes 5 microseconds a call."""


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, a positive number."""
    return 1 << (n - 1).bit_length()
