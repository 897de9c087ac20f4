"""The catalog of error ids: what each means and what helps. scripts/make_troubleshooting.py writes docs/troubleshooting.md from it.

An id says the kind of a problem; the error itself says which file, tensor or option. Its hundreds are the exit code (errors.py).
`former`: ids that earlier versions printed for the same kind. A number that was used once never gets another meaning.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    error_id: str
    title: str
    text: str  # Markdown; indented as the source is
    former: tuple[str, ...] = ()


CATALOG = (
    Entry(
        "E101",
        "The manifest or report is missing, unusable, or does not match the folder",
        """
        `verify` lists each file that is changed, missing or extra compared with `marlinctl_manifest.json`. Copy the folder again; keep your
        own files elsewhere (only card, report and log may be edited). A folder without a manifest was not published by marlinctl, or is an
        incomplete copy. For one of a newer marlinctl, update.

        `report` needs `marlinctl_report.json`; for other folders, use `inspect` and `eval`.
        """,
        ("E100", "E102", "E118"),
    ),
    Entry(
        "E103",
        "The files on disk differ from what was computed",
        """
        Check the disk and the memory of the machine, then run again. If both are sound, please report it.
        """,
        ("E110",),
    ),
    Entry(
        "E105",
        "The structure of the checkpoint is wrong",
        """
        Tensors are missing, left over, or have the wrong shape or dtype for this model and format, or `marlinctl_mask.safetensors` has a
        mask that no linear needs. Copy or write the folder again.
        """,
        ("E112",),
    ),
    Entry(
        "E106",
        "The contents of the checkpoint are wrong",
        """
        A second reading of the packed words gives other weights, codes break the padding rules, a tensor holds NaN or infinity, or a 2:4
        mask contradicts its weight. Copy or write the folder again; report it if that does not help.
        """,
        ("E111",),
    ),
    Entry(
        "E107",
        "Too far from the source",
        """
        With `--source`: a layer differs so much from the original that its layout or scales must be wrong, or an untouched tensor has
        changed. Check that `--source` is the model this checkpoint was made from.
        """,
    ),
    Entry(
        "E108",
        "transformers does not load the folder, or computes something else",
        """
        Loading fails, weights in transformers are not the dequantized ones, or its logits differ. Write the folder again; if that does not
        help, report it with the log of `--verbose`. Folders that [transformers is known to refuse](pack.md#who-loads-it) are tested with
        `--load` only. `compress` keeps the folder in `OUT.job/ct`; `resume` checks it again.
        """,
        ("E109",),
    ),
    Entry(
        "E113",
        "A kernel or packed tiles give a wrong product",
        """
        `verify` compares products of packed tiles with those of their codes and scales. Pack the model again; report it if the error stays.

        `bench` compares kernels with float64 first. Do not use a kernel that fails on this GPU, and report it with
        `marlinctl doctor --json`.
        """,
        ("E120",),
    ),
    Entry(
        "E115",
        "The quality gate refused the result, or cannot measure it",
        """
        `--max-kl` or `--max-ppl-ratio` is exceeded: the finished folder is kept as `OUT.rejected`. Distil the model, prune or quantize
        less, or publish it with `--publish-anyway`.

        The gate needs memory for both models. Use a larger machine, or omit the gate.
        """,
        ("E116",),
    ),
    Entry(
        "E117",
        "Processes disagree",
        """
        All processes must read the same model ([quantize](quantize.md#several-gpus-several-machines)), in training the same student and
        teacher; a sharded model must compute what the whole model does ([distill](distill.md#several-gpus-several-machines)). If the files
        on the machines differ, compare them with `sha256sum`; otherwise report it with `marlinctl doctor --json`. Nothing was computed.
        """,
    ),
    Entry(
        "E202",
        "A verb, option or value is unknown, missing or not allowed",
        """
        The line says what is allowed, or gives the nearest names. [The page of the command line](cli.md) has all options, and so has
        `marlinctl VERB --help-all`, or `--help` of a verb with few. Those of the Python API are the keys of a [recipe](recipes.md).
        `jobs rm` needs `--yes` with `--json` or without a terminal. float16 overflows in some models, and is slow on a CPU.
        """,
        ("E200", "E201", "E211", "E212", "E230", "E248", "E257", "E258", "E259", "E284", "E293", "E297", "E298"),
    ),
    Entry(
        "E206",
        "The recipe cannot be used",
        """
        The place is given as file:line:column. Causes: invalid YAML, text that is not UTF-8, tags such as `!!python`, anchors, aliases,
        dates, a duplicate or unknown key, a value of the wrong type or range, or a circle of `extends:`. `no` and `on` are booleans in
        YAML: quote them if you mean text. [recipes](recipes.md) lists all keys.
        """,
        ("E207", "E208", "E209", "E210"),
    ),
    Entry(
        "E222",
        "The output exists",
        """
        Choose another name, or pass `--overwrite`: a model, and nothing else ([E224](#e224)), is replaced when the new one is complete. If
        the folder appeared during the run, the result is in `OUT.job`: move the folder away and run `marlinctl resume OUT`.
        """,
    ),
    Entry(
        "E224",
        "Files that marlinctl did not write are in the way",
        """
        A folder that the run would replace, empty or remove holds other files, or links. Nothing was changed. Move them away or choose
        another name ([what is replaced](jobs.md#what-is-replaced-and-removed)). If the result is finished, it is in `OUT.job`: move the
        files away, then run `marlinctl resume OUT`.
        """,
        ("E226",),
    ),
    Entry(
        "E225",
        "This folder cannot be an output",
        """
        It overlaps the input, is a mount point, or is or contains the current folder or your home folder. Name a new folder beside the
        input, or one inside the mount point.
        """,
        ("E220",),
    ),
    Entry(
        "E240",
        "There is no such model, recipe, text or folder",
        """
        The path does not exist, is not a regular file, is too long, or has links in a circle. A model is a path or a hub id such as
        `HuggingFaceTB/SmolLM2-135M`; both were tried. A recipe is a built-in name (`marlinctl recipes ls`) or a file; `extends:` is
        relative to the recipe that names it. Names of text files end in .txt, .jsonl (both also .gz) or .parquet.
        """,
        ("E205", "E233", "E241", "E280", "E292"),
    ),
    Entry(
        "E243",
        "lm_eval cannot run a task",
        """
        It does not know the name (`lm_eval ls tasks` lists all), the folder of `--task-data` lacks the data, the task runs generated code
        without `--confirm-run-unsafe-code`, it needs pictures, or its own code fails, for example on a model with few positions. Add the
        data, or omit the task.
        [Finished tasks are kept](jobs.md#a-measurement-that-fails).
        """,
        ("E242", "E249"),
    ),
    Entry(
        "E244",
        "An output, log or results file cannot be written there",
        """
        - Output: its name belongs to a file or a dangling link, or the folder above it is not writable. Missing folders are made.
        - Log: its folder is not writable, or `OUT.log` is a link, or neither it nor `OUT.run.log` is a log of marlinctl. Move it away,
          or append to any file with `--log-file`.
        - Results (`--out`): the file exists (add `--resume`), its folder is missing, or `--resume` was given without `--out`.
        """,
        ("E204", "E221", "E223"),
    ),
    Entry(
        "E246",
        "A length or measurement setting is out of range",
        """
        Samples, windows, and prompt plus new tokens must not be longer than the model can read: use a smaller `--sequence-length`,
        `--distill-sequence-length` or `--window`.
        """,
        ("E252", "E299"),
    ),
    Entry(
        "E251",
        "The module map cannot be used",
        """
        It is malformed or names modules that the model does not have; the line lists what a block holds. Every block must have all linears
        of the [map](module-map.md): models whose blocks differ cannot be described.
        """,
    ),
    Entry(
        "E253",
        "Chats cannot be formatted",
        """
        With `--chat always`: the model has no chat template, or the data hold no chats. Use `--chat auto`. With `--apply-chat-template`:
        the model has no chat template; measure the instruct model, or omit the option.

        Or the model's template refuses more than a tenth of the chats, for example for a `system` turn. Remove those turns, or use
        `--chat never`, which reads chats as plain text.
        """,
        ("E262",),
    ),
    Entry(
        "E255",
        "Layers that cannot be selected or compressed as asked",
        """
        - A pattern matches no layer, or every layer. Patterns are shell globs for the full name or its tail (`o_proj`, `layers.0.*`), or
          `re:` and a regular expression.
        - K is not a multiple of the group size, or of four as 2:4 needs. Use a size that is listed, `--override 'PATTERN=group_size:32'`,
          or `--skip`.
        - Embeddings stay 16-bit. `--include` takes `lm_head` alone, and the model must have a linear of that name.
        - Linears with 8-bit activations have one scale per row: a rule gave one of them a group size, too. Activations of experts stay
          16-bit.
        """,
        ("E254", "E256", "E271"),
    ),
    Entry(
        "E261",
        "Models or scores that do not belong together",
        """
        `eval --against` needs the model that the other one was made from: tokenizers, vocabularies, chat templates and questions must
        agree.
        `report OUT --scores FILE` needs finished results of `eval OUT --out FILE` for this very folder.
        """,
        ("E247",),
    ),
    Entry(
        "E273",
        "The 2:4 pattern does not fit the command",
        """
        - The model is 2:4 already. `marlinctl quantize` keeps the pattern; to prune again, start from the dense model.
        - `marlin_24` holds 2:4 linears only, and the model is dense. Use the recipe `sparse-int4`, or `marlinctl sparsify` first.
        - 16 bits and no pattern would change nothing.
        - `--override 'PATTERN=bits:8,activations:...'` is for dense linears of a symmetric model: 2:4 linears have 16-bit activations.
        - `--group-scales integer` is for symmetric 4-bit codes.
        """,
        ("E270", "E272"),
    ),
    Entry(
        "E285",
        "An unfinished job for this output exists",
        """
        `OUT.job` holds a run that was stopped. `marlinctl resume OUT` continues it, and accepts other `--tasks`, `--text`, `--window` and
        the like. To start from the beginning, run `marlinctl jobs rm OUT` first.
        """,
    ),
    Entry(
        "E286",
        "The run to resume was started with something else",
        """
        Model, recipe, text, versions, dtype and kind of device must be the same. How the result is measured may differ.
        `...shards.NAME.sha256` means that the weights in this file changed though names and shapes did not. Restore the files, or run
        `marlinctl jobs rm OUT` and start again. For `eval --resume`, use the old settings, or another results file.
        """,
        ("E245",),
    ),
    Entry(
        "E287",
        "No job that can be resumed",
        """
        There is no `OUT.job`: the run ended, or stopped early. `marlinctl jobs ls FOLDER` lists jobs. Give the whole command again, without
        `--resume`. Or a newer marlinctl began the job: continue with that version, or run `marlinctl jobs rm OUT` and start again.
        """,
        ("E290",),
    ),
    Entry(
        "E288",
        "Options or settings that do not go together",
        """
        The line names them and says what to change. Examples: `pack --check` takes no OUT; SquareHead needs hidden states, which
        `--cache-logits` does not keep; a 4-bit student needs `--mode scales`; `--mask renewed` needs `--mode full`; `--activation-group`
        has no effect without `--activations int8`, nor `--mask-interval` without `--mask renewed`; `--from-block` counts decoder blocks
        from 0, which `distill` and `pack` do not have. Of `accelerate launch`,
        [distill](distill.md#several-gpus-several-machines) supports FSDP2 without offloading; each other setting is listed.
        """,
        ("E231", "E232", "E281", "E289", "E291", "E296"),
    ),
    Entry(
        "E301",
        "A file of the model is missing, damaged or unsafe",
        """
        Truncated or empty shards, git-lfs pointers (run `git lfs pull`), bad headers, missing files, tensors on which index and shards
        disagree, links and paths out of the folder, FIFOs and devices, invalid JSON, unreadable tokenizer or template files, names with
        control characters. Download the files again. If reading fails later, use a copy.

        Pickle files are refused, because loading one can run code. If a model has no safetensors, convert it on a machine you can afford to
        lose (from_pretrained, then save_pretrained).
        """,
        ("E300", "E303", "E305", "E350"),
    ),
    Entry(
        "E302",
        "Tensors do not match the model",
        """
        - Missing, or not of the shape that config.json gives: get the complete checkpoint. With `--source`, name the model this one was
          made from.
        - Other names: config.json is of a part of the model that the weights were saved from, or of another one. Every spelling that
          transformers loads is taken.
        - Left over: config.json has fewer blocks than the weights, or no bias where they have one, or an adapter was not merged. Tensors
          that stand beside the model are carried along and are no error.
        - config.json says packed, and no tensor is: it belongs to another model.
        - A tied output head that differs from the embedding: transformers uses the head, vLLM the embedding. If the head is right, write
          `"tie_word_embeddings": false` into config.json, else remove the tensor.
        """,
        ("E317", "E318", "E345", "E348", "E351", "E360", "E375", "E396"),
    ),
    Entry(
        "E304",
        "A file does not match its checksum",
        """
        Its SHA-256 differs from the name of its blob in the hub cache, or from the manifest of a folder that marlinctl published. Delete a
        blob to download it again; copy or write a published folder again. If you changed a file on purpose, remove
        `marlinctl_manifest.json`.
        """,
    ),
    Entry(
        "E306",
        "The model changed during the run",
        """
        Nothing was published; what was finished before the change is kept. Restore the files and run `marlinctl resume OUT`, or start again
        with a copy.
        """,
    ),
    Entry(
        "E307",
        "`--strict`: the folder is not in order",
        """
        Some weights are in no index, so they are not read, or the index has no metadata, so transformers does not load it. Remove the
        weights, download the index again, or omit `--strict`: then it is a warning.
        """,
    ),
    Entry(
        "E312",
        "The model needs its own Python code",
        """
        marlinctl never runs code from a model folder. Use a model that transformers supports by itself.
        """,
    ),
    Entry(
        "E313",
        "The model's format does not fit the command",
        """
        - `quantize`, and `distill` for its teacher, need 16-bit weights. To change the format of a quantized model, use `marlinctl pack`.
        - `pack` and `verify --source` need a quantized model; what follows `--source` is the 16-bit model that it was made from.
        - `distill` trains dense and ct students; convert others with `marlinctl pack STUDENT OUT --format ct`.
        - `bench --model` needs tiles: `marlinctl pack FOLDER OUT --format marlin`.
        - Packed linears compute in float16 or bfloat16: `from_pretrained(folder, dtype=torch.bfloat16)`. `marlinctl.api.load` dequantizes
          to any dtype.
        """,
        ("E347", "E362", "E365", "E373"),
    ),
    Entry(
        "E314",
        "The tokenizer is missing, unreadable, or does not fit the model",
        """
        Copy tokenizer.json and tokenizer_config.json from the original model. If the tokenizer has ids beyond the embedding, it belongs to
        another model, or the embedding was not resized: take both from one checkpoint.
        """,
        ("E315", "E386", "E394"),
    ),
    Entry(
        "E320",
        "The GGUF file cannot be used",
        """
        It is damaged (download it again), or its architecture, settings, tensors, quantization type or tokenizer cannot be converted
        exactly. Use the model's safetensors folder, or another GGUF file.
        """,
        ("E321", "E322", "E323", "E324"),
    ),
    Entry(
        "E325",
        "Reading was stopped: too large, too slow, or a library failed",
        """
        - Text: a .gz file more than a hundred times its size, a .parquet file or hub data set that takes more than 1 GiB of memory, or a
          million blank lines. Unpack the file first, or write it as .jsonl.
        - Chat template: more than 20 seconds for a chat, or 1 GiB. Do not trust this model; `--chat never` reads chats as plain text.
        - Tokenizer: a regular expression does not end on some text. Copy the tokenizer's files from the original model, or find the text
          with fewer `--samples`.
        """,
        ("E326", "E327", "E328"),
    ),
    Entry(
        "E340",
        "This quantization is not supported",
        """
        Only 4-bit and 8-bit weights are read, in compressed-tensors, GPTQ and native folders: zero points with 4 bits alone, no activation
        order at run time. Quantized activations are read in compressed-tensors alone: int8 or FP8 with a dynamic scale for each token,
        beside weights of the same type with one scale per row, and not of experts. The layers or fields are listed. Unknown fields and
        tensors are refused because they may change what the model computes. Quantize the original model; a field that only notes how the
        codes were made can be removed from config.json.

        For a newer native format, update marlinctl, or pack the model to `ct` with the version that wrote it.
        """,
        ("E341", "E342", "E343"),
    ),
    Entry(
        "E346",
        "A packed layer cannot be unpacked",
        """
        Wrong shapes, or 2:4 metadata that do not name two kept weights in order: fetch or write the file again. Zero points, or activation
        order at run time (`desc_act`): quantize the model again with static order. GPTQ whose zero points are those of version 2 under the
        label of version 1: `marlinctl pack SOURCE OUT --gptq-v2`.
        """,
    ),
    Entry(
        "E349",
        "Layers do not fit the target format",
        """
        The reasons are listed, such as N or K not a multiple of 8 for GPTQ, or scales that float16 cannot hold exactly. `ct` keeps bfloat16
        scales.
        """,
        ("E344",),
    ),
    Entry(
        "E356",
        "The 2:4 pattern or the mask file is wrong",
        """
        - Linears are not 2:4: four neighbours along K hold more than two weights. `marlin_24`, and `distill` without a mask file, need
          every linear to be 2:4. Prune the original with `marlinctl sparsify`, or pack to `marlin`. `distill --mask renewed` takes dense
          students, but no linear whose K is not a multiple of 4.
        - `marlinctl_mask.safetensors` is damaged, marks a nonzero weight as pruned, or belongs to another model. Fetch or write the folder
          again. Without the file, `pack` takes the pattern from the zeros.
        """,
        ("E352", "E353", "E354", "E355", "E357", "E370", "E372"),
    ),
    Entry(
        "E371",
        "The teacher does not fit the student",
        """
        Depth, hidden size, vocabulary and token ids must agree. Use the student's original, or a fine-tuned version of it.
        """,
    ),
    Entry(
        "E374",
        "A file that marlinctl wrote is damaged or of another kind",
        """
        - `OUT.job`: a file that cannot be recomputed is missing or unreadable. Run `marlinctl jobs rm OUT`, then the whole command.
        - `eval --resume`, `bench --from`, `report`: the file is damaged, of another program or model, or of another version. Restore it, or
          name another one.
        - `dispatch.json` of `bench --tune`: remove it; the built-in table is used instead.
        """,
        ("E388", "E397", "E398", "E399"),
    ),
    Entry(
        "E385",
        "The text or data cannot be read",
        """
        - The file is damaged: copy it again. Local data of a task need the columns of the data set on the hub.
        - It is not UTF-8: convert it, for example with `iconv`.
        - A line of a .jsonl file is not an object: write `{"text": "..."}`.
        - There is no column `text`, `messages`, `conversations` or `instruction` with `output`, or a value has the wrong type. For
          calibration and training such rows are skipped, up to a tenth; the first three are named with their lines.
        - A line or text exceeds 16 MiB: split it.
        - The hub data set is a Python script: choose another one.
        """,
        ("E379", "E381", "E382", "E383", "E384", "E387", "E395"),
    ),
    Entry(
        "E390",
        "This kind of model is not supported",
        """
        The message gives the reason: experts that are held in a way of their own, blocks that are given more than hidden states.
        [Models](models.md) lists the types that work. A few others can be described with `--module-map FILE`
        ([module maps](module-map.md)).

        A LoRA adapter (`adapter_config.json`) must be merged into its model first.
        """,
        ("E316",),
    ),
    Entry(
        "E392",
        "The model cannot be built from config.json",
        """
        The file is damaged, its fields are missing or make no sense, or transformers has no language model of this type. Restore the
        model's own file, or install a transformers release that supports the model.
        """,
        ("E310", "E311", "E361", "E391"),
    ),
    Entry(
        "E393",
        "There is too little text",
        """
        Give more text, fewer `--samples`, or a smaller `--sequence-length` or `--window`.
        """,
        ("E380", "E389"),
    ),
    Entry(
        "E402",
        "A Python package is missing",
        """
        Tasks and .parquet files need `pip install 'marlinctl[eval]'`; hub data sets need that or `marlinctl[distill]`; `distill --tracker`
        needs `marlinctl[tensorboard]` or `marlinctl[wandb]`. Some tasks need packages or NLTK data of their own: run the command in the
        error. `--backend vllm` needs vLLM.

        A package that marlinctl always needs is missing or too old after `pip install --no-deps`, or when another install has replaced it:
        `marlinctl doctor --quick` names each and the pip command for it.
        """,
        ("E400",),
    ),
    Entry(
        "E403",
        "CUDA kernels cannot be compiled or loaded",
        """
        NVRTC compiles kernels at first use, through the package cuda-bindings. Both come with CUDA builds of torch, and are needed even if
        the kernels are cached.

        - Missing or damaged: install a CUDA build of torch, or `pip install cuda-bindings nvidia-cuda-nvrtc`. If libnvrtc or
          libnvrtc-builtins alone is missing, add `--force-reinstall`.
        - Compilation failed: use the NVRTC of constraints.txt; if it still fails, report the lines.
        - The driver is older than NVRTC (13 needs driver 580): update it, or install a torch built for the driver's CUDA.
        """,
        ("E404", "E405"),
    ),
    Entry(
        "E406",
        "The tracker of a training does not start",
        """
        `distill --tracker wandb` needs a login (`wandb login`) and a connection, or `--offline`. TensorBoard's files are written to
        `OUT.tensorboard`. Without `--tracker`, OUT's report has the loss curve.
        """,
    ),
    Entry(
        "E420",
        "There is no usable GPU",
        """
        torch sees no CUDA device, or not the one that `--device` names; `marlinctl doctor` tests more. Use `--device cpu`.

        `bench` needs compute capability 8.0 to 12.x (A100, A10, RTX 30, 40 and 50, L4, L40, H100, H200, B200) or `--device cpu`.
        Compressing does not. For Blackwell (10.0 to 12.x) the kernels are compiled and were never run by us: `bench --check` tests them.
        Without a GPU, `bench --build --arch` compiles the kernels, and `verify --kernels` uses the emulator.
        """,
        ("E401", "E421"),
    ),
    Entry(
        "E490",
        "The system does not permit it",
        """
        No permission, or a read-only file system: check owner and permissions of the path. If the current folder was deleted, change to
        another one.

        For caches, name another place with `--cache-dir` or `MARLINCTL_CACHE` (the hub's: `HF_HOME`). The folder `kernels` there must
        belong to you and not be a link, because machine code of other users is not run.
        """,
        ("E410",),
    ),
    Entry(
        "E500",
        "The disk is full, or writing failed",
        """
        Free some space (or quota), check the disk or network drive, or choose another place (`--cache-dir` for fetched and converted
        models). An existing output is unchanged.

        - Activations are stored beside the output during the run: use fewer samples, or put OUT on another disk.
        - Results of `eval`: run again with `--resume`.
        - If the old output could not be deleted, the new one is complete: delete the old one yourself.
        """,
        ("E501", "E502", "E521", "E530", "E531", "E591"),
    ),
    Entry(
        "E503",
        "Another run holds the lock, or the lock cannot be taken",
        """
        Wait until that run ends, or stop it. If `lock` in `OUT.job`, or beside a converted GGUF file in the cache, is a folder or a link,
        move it away. If the file system has no locks, use another disk.
        """,
        ("E504",),
    ),
    Entry(
        "E505",
        "A process of a run over several has ended",
        """
        All others end with it; nothing is published, and what is finished is kept. The message says which process it was, and on which
        machine. Look there for memory that ran out, in the log of the kernel too. `marlinctl resume OUT` continues, under the launcher
        with any number of processes, or without it.
        """,
    ),
    Entry(
        "E522",
        "Not enough memory for the run",
        """
        The estimate exceeds the free memory or `--max-memory`, or the largest solve, tried on random numbers, does not fit. Nothing was
        written. `marlinctl plan` shows what takes how much. Use fewer samples, a smaller `--sequence-length`, a text file in place of
        `--calibration self` (which loads the whole model), or `--device cpu`. A larger `--max-memory` starts all the same.
        """,
        ("E520",),
    ),
    Entry(
        "E590",
        "Memory ran out",
        """
        Close other programs, lower `--max-memory`, or use fewer or shorter samples. On a GPU, a block is repeated once with half of the
        tokens in flight; if that fails too, use a smaller `--sequence-length` or `--device cpu`. Finished blocks are kept: run
        `marlinctl resume`. In a task, use a smaller `--batch-size` and add `--resume`.
        """,
        ("E523", "E532"),
    ),
    Entry(
        "E604",
        "Values that the target type cannot hold",
        """
        - 4 bits: a code times a float16 scale reaches from about 3e-5 to 456,960 in magnitude. Leave a linear with larger weights, or with
          smaller ones only, at 16 bits: `--skip NAME`.
        - Dense float16 copies: keep a packed format.
        - GGUF: the file is damaged, or the model needs bfloat16. Use its safetensors folder.
        - Trained weights: use a lower `--learning-rate`.
        - Weights that are rotated: use `--rotate never`, or a bfloat16 copy of the model.
        """,
        ("E600", "E621", "E623"),
    ),
    Entry(
        "E605",
        "`--strict` forbids a fallback or suspicious values",
        """
        The Hessian of a layer cannot be factored: use more or other calibration text, or a higher `--damping`. A weight is all zeros or has
        constant columns: compare it with the original's. Inputs of a linear were zero in all of calibration: use other text. Without
        `--strict`, this is a warning in the report.
        """,
        ("E602",),
    ),
    Entry(
        "E620",
        "NaN or infinity",
        """
        Weights: the checkpoint is damaged. Activations, predictions, Hessians: check the original model, then try `--dtype float32`; if
        that helps, values overflowed in 16 bits. Calibration may lose up to a tenth of its tokens. Loss of `distill`: also try a lower
        `--learning-rate`; the last saved state is kept.
        """,
        ("E601", "E603", "E622"),
    ),
    Entry(
        "E701",
        "The hub refuses access",
        """
        The model is gated: request access on its page, then run `hf auth login`. Or the hub refuses the token: run `hf auth login`, or
        unset an outdated `HF_TOKEN`.
        """,
        ("E704",),
    ),
    Entry(
        "E702",
        "The hub has no such model or revision",
        """
        Check the spelling; the model's page lists branches and tags. For a private model, run `hf auth login`.
        """,
        ("E703",),
    ),
    Entry(
        "E707",
        "The hub or the network failed",
        """
        Check network and proxy, then run again: a download continues where it stopped. If the hub asks to slow down, wait some minutes;
        `hf auth login` raises the limits. `--offline` uses what was downloaded before. For a hub data set, check `org/name:config:split`,
        or give a local file. For tasks, give local copies with `--task-data`.
        """,
        ("E705", "E706", "E710", "E720"),
    ),
    Entry(
        "E709",
        "Offline, and not completely in the cache",
        """
        Run once without `--offline` where there is a network.
        """,
        ("E708",),
    ),
    Entry(
        "E900",
        "An unexpected error",
        """
        Run again with `--debug` and report it with the log; tokens and your home folder are already removed from it.
        """,
    ),
)
