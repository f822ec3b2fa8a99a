"""Refused families: why models of other kinds are not cut, by their ``model_type``. Data beside ``FAMILIES``."""

RECURRENT = "its layers mix tokens by a recurrent state or a convolution that no row of the table describes yet"
COMPRESSED = "its queries, keys and values come from compressed ones (MLA), so that heads have no rows of their own"
MIXTURE = "its mixture of experts has a router, or experts, that no row of the table describes yet"
FUSED_EXPERTS = (
    "a checkpoint holds the experts of a layer as one tensor, in a form that no row of the table describes yet"
)
ENCODER = "it is an encoder, or has one; cut are decoders"
MULTIMODAL = "it reads more than text; cut are checkpoints of a language model alone"
EMBEDDED = "it is the language model of a multimodal checkpoint, which no row of the table describes yet"
CONV1D = "its matrices are stored transposed"
FUSED_HEADS = "its queries, keys and values are one matrix, in an order that no row of the table describes"
OLDER = "it is older than the models that people prune, and nobody has asked for a row of the table"
LATER = "vLLM 0.32 does not run beside the transformers that has it, and no row of the table describes it yet"

REASONS: dict[str, tuple[str, ...]] = {
    RECURRENT: (
        "bailing_hybrid",
        "bamba",
        "falcon_mamba",
        "inkling2_loop_text",
        "inkling2_text",
        "jamba",
        "kimi_linear",
        "lara_mini",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "olmo_hybrid",
        "qwen4_exp",
        "qwen4_exp_text",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ),
    COMPRESSED: (
        "axk1",
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "glm_moe_dsa",
        "longcat_flash",
        "minicpm3",
        "sarvam_mla",
        "youtu",
    ),
    MIXTURE: (
        "afmoe",
        "beam",
        "cohere2_moe",
        "flint",
        "hunyuan_v1_moe",
        "hy_v3",
        "hy_v4",
        "inkling_text",
        "jetmoe",
        "kolibri1",
        "laguna",
        "mimo_v2_flash",
        "minimax_m3_vl_text",
        "sarvam_moe",
    ),
    FUSED_EXPERTS: (
        "aria_text",
        "dbrx",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
    ),
    MULTIMODAL: (
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3n",
        "gemma4_unified",
        "git",
        "got_ocr2",
        "mllama",
        "moshi",
        "moss_transcribe_diarize",
        "phi4_multimodal",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl_moe",
    ),
    ENCODER: (
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "t5",
        "t5gemma",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ),
    CONV1D: ("gpt2", "gpt-sw3", "openai-gpt"),
    FUSED_HEADS: ("bloom", "codegen", "falcon", "gpt_bigcode", "gpt_neox_japanese", "mpt", "persimmon"),
    OLDER: ("biogpt", "cpmant", "ctrl", "gpt_neo", "gptj", "reformer", "xglm"),
    "its weights are ternary": ("bitnet",),
    "it reads bytes, in patches that a model of its own finds": ("blt",),
    "its layers have other names than any row of the table": ("modernbert-decoder", "nanochat"),
    "its attention has a mask that every head learns": ("doge",),
    "heads come in pairs, whose difference is the attention": ("diffllama",),
    "its layers run several times in a forward pass": ("dory", "hrm_text"),
    "its layers share keys and values, and have inputs of their own beside the residual stream": ("gemma3n_text",),
    "its layers share keys and values, have heads of two sizes and inputs of their own beside the residual stream": (
        "gemma4_unified_text",
    ),
    "it drafts for another model, whose hidden states it reads": ("gemma4_assistant", "gemma4_unified_assistant"),
    EMBEDDED: ("apertus1p5_text", "cohere_compass_text", "dots3_note_text"),
    LATER: ("exaone", "internlm3", "iquestcoder"),
}
"""Kinds of models by why they are refused."""
WHY_REFUSED = {model_type: reason for reason, model_types in REASONS.items() for model_type in model_types}
"""Why each ``model_type`` is refused; what is neither here nor in ``FAMILIES`` is unknown. A row of ``FAMILIES`` goes
first, so that an entry here may outlive its reason."""
