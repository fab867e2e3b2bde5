"""What Liger's names share."""


def one_of(name, argument, value, known):
    """Refuse what is not known: an option must not be dropped in silence."""
    if not any(value is k or value == k for k in known):
        raise ValueError(f"{name}: {argument} must be one of {', '.join(map(repr, known))}, got {value!r}")


def positive(name, argument, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: {argument} must be a positive integer, got {value!r}")
