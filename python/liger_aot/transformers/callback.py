"""Trainer(..., callbacks=[LigerCallback()])"""

import inspect
import weakref

from transformers import TrainerCallback

from ..bind import bind
from .monkey_patch import rebind


class LigerCallback(TrainerCallback):
    """bind(model, **options) at the end of Trainer.__init__, before accelerate prepares the model; `report` is what it said.

    A Trainer with a model_init builds its model anew as training begins: that one is bound then.
    """

    def __init__(self, **options):
        known = [*inspect.signature(bind).parameters][1:]
        if unknown := options.keys() - {*known}:
            raise TypeError(
                f"LigerCallback: options must be those of bind, {', '.join(known)}; got {', '.join(sorted(unknown))}"
            )
        self.options, self.report, self.known = options, None, None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if args.use_liger_kernel:
            raise ValueError("LigerCallback: use_liger_kernel must be False, got True, which patches the model a second time")
        # As training begins, the model may stand inside a wrapper of accelerate's or of torch.compile's.
        known = self.known and self.known()
        if known is None or all(module is not known for module in model.modules()):
            self.known = weakref.ref(model)
            self.report = rebind(model, self.options)

    on_train_begin = on_init_end

    def __getstate__(self):
        """No weak reference can be pickled; which model was bound is this process's matter."""
        return {**vars(self), "known": None}
