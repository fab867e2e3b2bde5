"""One operator a file. Liger's autograd functions, LigerXFunction.apply(...), are found here by their names too."""


def __getattr__(name):
    if name.startswith(("Liger", "GrpoLoss")) or name == "apply_tiled_mlp":
        from ..transformers import _functions

        if hasattr(_functions, name):
            return getattr(_functions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
