"""How BigDL 2.x' arguments of inference calls are answered: they work, or the error says what to
write now. One table a call.
"""

from __future__ import annotations

from collections.abc import Mapping

from bigdl._base.calls import Gone, Renamed

Table = Mapping[str, Renamed | Gone]

__all__ = [
    "BEST_MODEL", "GET_MODEL", "LOAD", "MULTI_INSTANCE", "OPTIMIZE", "QUANTIZE", "SAVE", "TRACE",
]  # fmt: skip

_IPEX = Gone(
    "IPEX has ended. Use quantize(model, 'bf16') or trace(model, accelerator='compile').",
    harmless=(None, False),
)
_THREADS = Gone(
    "models run on torch's number of threads: call torch.set_num_threads(n) before this."
)
_QUIET = Gone(
    "the library logs through Python's logging, under 'bigdl'.", harmless=(None, True, False)
)
_CPU = Gone("accelerated models run on the CPU; move a plain model with model.to(device).",
            harmless=(None, "CPU", "cpu"))  # fmt: skip
_LAYOUT = Gone(
    "choose it as a method: optimize(…, includes=['channels_last']).", harmless=(None, False)
)
_CONFIG = "options of a runtime are given as config="
_HOME = "bigdl.nano.accelerators"
_SESSION = Gone(f"{_CONFIG}{{name: value}}, as {_HOME}.onnxruntime.OnnxRuntimeConfig has them.")
_OPENVINO = Gone(f"{_CONFIG}{{name: value}}, as {_HOME}.openvino.OpenVinoConfig has them.")
_JIT = Gone("TorchScript is not used any more: trace(model, sample, accelerator='compile').",
            harmless=(None, True))  # fmt: skip
_INPLACE = Gone(
    "the result is always a new module, and yours stays as it is.", harmless=(None, False)
)
_TENSORS = Gone("outputs are always what the original's are: tensors.", harmless=(None, True))
_KEYWORDS = Gone("give the dict as input_sample: trace(model, {'name': tensor}).")
_TUNING = Gone(
    "accuracy is kept by accuracy_criterion=, with accelerator='openvino' layer by layer."
)

_BUILDING: Table = {
    "use_ipex": _IPEX,
    "thread_num": _THREADS,
    "logging": _QUIET,
    "device": _CPU,
    "channels_last": _LAYOUT,
    "onnxruntime_session_options": _SESSION,
    "openvino_config": _OPENVINO,
    "simplification": Gone("graphs are always simplified by the runtime.", harmless=(None, True)),
    "jit_strict": _JIT,
    "jit_method": Gone(_JIT.instead),
    "strict_check": _JIT,
    "weights_prepack": _IPEX,
    "enable_onednn": Gone("torch uses oneDNN by itself.", harmless=(None, True)),
    "inplace": _INPLACE,
    "output_tensors": _TENSORS,
    "example_kwarg_inputs": _KEYWORDS,
    "cache_dir": _OPENVINO,
}

TRACE: Table = _BUILDING

QUANTIZE: Table = {
    **_BUILDING,
    "calib_dataloader": Renamed("calib_data"),
    "val_dataloader": Renamed("validation_data"),
    "eval_func": Gone("give it as metric=fn(model, loader), with validation_data=."),
    "approach": Gone(
        "static is the default; dynamic is accelerator='onnxruntime', "
        "config={'quantization': 'dynamic'}.",
        harmless=(None, "static"),
    ),
    "method": Gone(
        "'qlinear' is the default of accelerator='onnxruntime'; 'integer' is "
        "config={'quantization': 'dynamic'}.",
        harmless=(None, "fx", "qlinear"),
    ),
    "backend": Gone("it is accelerator= now.", harmless=(None, "inc")),
    "conf": _TUNING,
    "tuning_strategy": _TUNING,
    "timeout": _TUNING,
    "max_trials": _TUNING,
    "q_config": Gone(f"{_CONFIG}{{name: value}}."),
    "sample_size": Gone(f"{_CONFIG}{{'subset_size': …}} (OpenVINO)."),
    "dynamic_axes": Gone(
        "the first axis varies where the model can do it; trace() takes dynamic_axes.",
        harmless=(None, True),
    ),
}

OPTIMIZE: Table = {
    "use_ipex": _IPEX,
    "thread_num": _THREADS,
    "logging": _QUIET,
    "search_mode": Gone(
        "every method is tried, best-known first; limit it by includes=, excludes= or budget_s=.",
        harmless=(None, "default", "all"),
    ),
    "search_env": Gone("every method runs in a process of its own."),
    "dynamic_axes": Gone(
        "the first axis varies where the model can do it; trace() takes dynamic_axes.",
        harmless=(None, True),
    ),
    "latency_sample_num": Gone("timing takes what budget_s allows.", harmless=(None, 100)),
    "calib_dataloader": Renamed("training_data"),
    "output_tensors": _TENSORS,
    "output_filename": Gone("write the table: open(path, 'w').write(str(opt.last_report))."),
}

BEST_MODEL: Table = {"use_ipex": _IPEX}
GET_MODEL: Table = {"method_name": Renamed("name")}
SAVE: Table = {"compression": Gone("weights are stored as they are.", harmless=(None, "fp32"))}
LOAD: Table = {
    "input_sample": Gone("the saved folder knows its inputs."),
    "inplace": _INPLACE,
    "device": _CPU,
    "cache_dir": _OPENVINO,
    "shapes": Gone("the saved folder knows its inputs; save it with other dynamic_axes."),
}
MULTI_INSTANCE: Table = {}
