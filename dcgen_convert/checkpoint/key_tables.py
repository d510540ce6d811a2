"""Key maps as data: one line per tensor of an original layout and what diffusers calls it. `keymap` reads it both ways.

    LEFT = RIGHT            the same tensor under another name; a line of one name stands in both layouts
    LEFT = A.{b+c+d}.E      LEFT holds the rows of A.b.E, A.c.E and A.d.E, one below the other, in equal parts
    LEFT = A.{b:D+c+d}.E    A.b.E has D rows, the others share the rest; D is the model's width
    LEFT ~ RIGHT            the two halves of the rows change places (shift, scale -> scale, shift)
    LEFT = RIGHT (6, -1)    RIGHT has that shape
    LEFT -                  diffusers has no such tensor: the network does not use it

`#` is a block's number, `$` the highest one, `*` weight and bias; `{a,b}` is both, the same on either side.
Source: what `from_single_file` of diffusers 0.42 does for each class. Here every size is taken from the tensors. The
norms of SANA-1.5's queries and keys are only in scripts/convert_sana_to_diffusers.py of diffusers.
"""

from __future__ import annotations

_STREAMS = """
img_in.* = x_embedder.*
txt_in.* = context_embedder.*
final_layer.linear.* = proj_out.*
double_blocks.#.img_attn.qkv.* = transformer_blocks.#.attn.{to_q+to_k+to_v}.*
double_blocks.#.txt_attn.qkv.* = transformer_blocks.#.attn.{add_q_proj+add_k_proj+add_v_proj}.*
double_blocks.#.img_attn.norm.query_norm.scale = transformer_blocks.#.attn.norm_q.weight
double_blocks.#.img_attn.norm.key_norm.scale = transformer_blocks.#.attn.norm_k.weight
double_blocks.#.txt_attn.norm.query_norm.scale = transformer_blocks.#.attn.norm_added_q.weight
double_blocks.#.txt_attn.norm.key_norm.scale = transformer_blocks.#.attn.norm_added_k.weight
double_blocks.#.img_attn.proj.* = transformer_blocks.#.attn.to_out.0.*
double_blocks.#.txt_attn.proj.* = transformer_blocks.#.attn.to_add_out.*
single_blocks.#.norm.query_norm.scale = single_transformer_blocks.#.attn.norm_q.weight
single_blocks.#.norm.key_norm.scale = single_transformer_blocks.#.attn.norm_k.weight
"""

_FLUX_BLOCKS = f"""
{_STREAMS}
double_blocks.#.img_mlp.0.* = transformer_blocks.#.ff.net.0.proj.*
double_blocks.#.img_mlp.2.* = transformer_blocks.#.ff.net.2.*
double_blocks.#.txt_mlp.0.* = transformer_blocks.#.ff_context.net.0.proj.*
double_blocks.#.txt_mlp.2.* = transformer_blocks.#.ff_context.net.2.*
single_blocks.#.linear1.* = single_transformer_blocks.#.{{attn.to_q:D+attn.to_k:D+attn.to_v:D+proj_mlp}}.*
single_blocks.#.linear2.* = single_transformer_blocks.#.proj_out.*
"""

FLUX = f"""
{_FLUX_BLOCKS}
time_in.in_layer.* = time_text_embed.timestep_embedder.linear_1.*
time_in.out_layer.* = time_text_embed.timestep_embedder.linear_2.*
vector_in.in_layer.* = time_text_embed.text_embedder.linear_1.*
vector_in.out_layer.* = time_text_embed.text_embedder.linear_2.*
guidance_in.in_layer.* = time_text_embed.guidance_embedder.linear_1.*
guidance_in.out_layer.* = time_text_embed.guidance_embedder.linear_2.*
double_blocks.#.img_mod.lin.* = transformer_blocks.#.norm1.linear.*
double_blocks.#.txt_mod.lin.* = transformer_blocks.#.norm1_context.linear.*
single_blocks.#.modulation.lin.* = single_transformer_blocks.#.norm.linear.*
final_layer.adaLN_modulation.1.* ~ norm_out.linear.*
"""

CHROMA = f"""
{_FLUX_BLOCKS}
distilled_guidance_layer.{{in_proj,out_proj}}.*
distilled_guidance_layer.layers.#.in_layer.* = distilled_guidance_layer.layers.#.linear_1.*
distilled_guidance_layer.layers.#.out_layer.* = distilled_guidance_layer.layers.#.linear_2.*
distilled_guidance_layer.norms.#.scale = distilled_guidance_layer.norms.#.weight
"""

FLUX2 = f"""
{_STREAMS}
time_in.in_layer.* = time_guidance_embed.timestep_embedder.linear_1.*
time_in.out_layer.* = time_guidance_embed.timestep_embedder.linear_2.*
guidance_in.in_layer.* = time_guidance_embed.guidance_embedder.linear_1.*
guidance_in.out_layer.* = time_guidance_embed.guidance_embedder.linear_2.*
double_stream_modulation_{{img,txt}}.lin.* = double_stream_modulation_{{img,txt}}.linear.*
single_stream_modulation.lin.* = single_stream_modulation.linear.*
double_blocks.#.img_mlp.0.* = transformer_blocks.#.ff.linear_in.*
double_blocks.#.img_mlp.2.* = transformer_blocks.#.ff.linear_out.*
double_blocks.#.txt_mlp.0.* = transformer_blocks.#.ff_context.linear_in.*
double_blocks.#.txt_mlp.2.* = transformer_blocks.#.ff_context.linear_out.*
single_blocks.#.linear1.* = single_transformer_blocks.#.attn.to_qkv_mlp_proj.*
single_blocks.#.linear2.* = single_transformer_blocks.#.attn.to_out.*
final_layer.adaLN_modulation.1.* ~ norm_out.linear.*
"""

SD3 = """
pos_embed = pos_embed.pos_embed
x_embedder.proj.* = pos_embed.proj.*
context_embedder.*
t_embedder.mlp.0.* = time_text_embed.timestep_embedder.linear_1.*
t_embedder.mlp.2.* = time_text_embed.timestep_embedder.linear_2.*
y_embedder.mlp.0.* = time_text_embed.text_embedder.linear_1.*
y_embedder.mlp.2.* = time_text_embed.text_embedder.linear_2.*
joint_blocks.#.x_block.{attn,attn2}.qkv.* = transformer_blocks.#.{attn,attn2}.{to_q+to_k+to_v}.*
joint_blocks.#.x_block.{attn,attn2}.ln_q.weight = transformer_blocks.#.{attn,attn2}.norm_q.weight
joint_blocks.#.x_block.{attn,attn2}.ln_k.weight = transformer_blocks.#.{attn,attn2}.norm_k.weight
joint_blocks.#.x_block.{attn,attn2}.proj.* = transformer_blocks.#.{attn,attn2}.to_out.0.*
joint_blocks.#.context_block.attn.qkv.* = transformer_blocks.#.attn.{add_q_proj+add_k_proj+add_v_proj}.*
joint_blocks.#.context_block.attn.ln_q.weight = transformer_blocks.#.attn.norm_added_q.weight
joint_blocks.#.context_block.attn.ln_k.weight = transformer_blocks.#.attn.norm_added_k.weight
joint_blocks.#.context_block.attn.proj.* = transformer_blocks.#.attn.to_add_out.*
joint_blocks.#.x_block.adaLN_modulation.1.* = transformer_blocks.#.norm1.linear.*
joint_blocks.#.context_block.adaLN_modulation.1.* = transformer_blocks.#.norm1_context.linear.*
joint_blocks.$.context_block.adaLN_modulation.1.* ~ transformer_blocks.$.norm1_context.linear.*
joint_blocks.#.x_block.mlp.fc1.* = transformer_blocks.#.ff.net.0.proj.*
joint_blocks.#.x_block.mlp.fc2.* = transformer_blocks.#.ff.net.2.*
joint_blocks.#.context_block.mlp.fc1.* = transformer_blocks.#.ff_context.net.0.proj.*
joint_blocks.#.context_block.mlp.fc2.* = transformer_blocks.#.ff_context.net.2.*
final_layer.linear.* = proj_out.*
final_layer.adaLN_modulation.1.* ~ norm_out.linear.*
"""

_SANA = """
pos_embed -
y_embedder.y_embedding -
logvar_linear.* -
x_embedder.proj.* = patch_embed.proj.*
t_block.1.* = time_embed.linear.*
y_embedder.y_proj.fc1.* = caption_projection.linear_1.*
y_embedder.y_proj.fc2.* = caption_projection.linear_2.*
attention_y_norm.weight = caption_norm.weight
blocks.#.scale_shift_table = transformer_blocks.#.scale_shift_table
blocks.#.attn.qkv.weight = transformer_blocks.#.attn1.{to_q+to_k+to_v}.weight
blocks.#.attn.{q,k}_norm.weight = transformer_blocks.#.attn1.norm_{q,k}.weight
blocks.#.attn.proj.* = transformer_blocks.#.attn1.to_out.0.*
blocks.#.cross_attn.{q,k}_norm.weight = transformer_blocks.#.attn2.norm_{q,k}.weight
blocks.#.cross_attn.q_linear.* = transformer_blocks.#.attn2.to_q.*
blocks.#.cross_attn.kv_linear.* = transformer_blocks.#.attn2.{to_k+to_v}.*
blocks.#.cross_attn.proj.* = transformer_blocks.#.attn2.to_out.0.*
blocks.#.mlp.inverted_conv.conv.* = transformer_blocks.#.ff.conv_inverted.*
blocks.#.mlp.depth_conv.conv.* = transformer_blocks.#.ff.conv_depth.*
blocks.#.mlp.point_conv.conv.weight = transformer_blocks.#.ff.conv_point.weight
final_layer.linear.* = proj_out.*
final_layer.scale_shift_table = scale_shift_table
"""

SANA = f"""
{_SANA}
t_embedder.mlp.0.* = time_embed.emb.timestep_embedder.linear_1.*
t_embedder.mlp.2.* = time_embed.emb.timestep_embedder.linear_2.*
"""

SANA_SPRINT = f"""
{_SANA}
t_embedder.mlp.0.* = time_embed.timestep_embedder.linear_1.*
t_embedder.mlp.2.* = time_embed.timestep_embedder.linear_2.*
cfg_embedder.mlp.0.* = time_embed.guidance_embedder.linear_1.*
cfg_embedder.mlp.2.* = time_embed.guidance_embedder.linear_2.*
"""

AURAFLOW = """
register_tokens
positional_encoding = pos_embed.pos_embed
init_x_linear.* = pos_embed.proj.*
cond_seq_linear.weight = context_embedder.weight
t_embedder.mlp.0.* = time_step_proj.linear_1.*
t_embedder.mlp.2.* = time_step_proj.linear_2.*
double_layers.#.attn.w1{q,k,v}.weight = joint_transformer_blocks.#.attn.add_{q,k,v}_proj.weight
double_layers.#.attn.w2{q,k,v}.weight = joint_transformer_blocks.#.attn.to_{q,k,v}.weight
double_layers.#.attn.w1o.weight = joint_transformer_blocks.#.attn.to_add_out.weight
double_layers.#.attn.w2o.weight = joint_transformer_blocks.#.attn.to_out.0.weight
double_layers.#.mlpX.c_fc{1,2}.weight = joint_transformer_blocks.#.ff.linear_{1,2}.weight
double_layers.#.mlpC.c_fc{1,2}.weight = joint_transformer_blocks.#.ff_context.linear_{1,2}.weight
double_layers.#.mlpX.c_proj.weight = joint_transformer_blocks.#.ff.out_projection.weight
double_layers.#.mlpC.c_proj.weight = joint_transformer_blocks.#.ff_context.out_projection.weight
double_layers.#.modX.1.weight = joint_transformer_blocks.#.norm1.linear.weight
double_layers.#.modC.1.weight = joint_transformer_blocks.#.norm1_context.linear.weight
single_layers.#.attn.w1{q,k,v}.weight = single_transformer_blocks.#.attn.to_{q,k,v}.weight
single_layers.#.attn.w1o.weight = single_transformer_blocks.#.attn.to_out.0.weight
single_layers.#.mlp.c_fc{1,2}.weight = single_transformer_blocks.#.ff.linear_{1,2}.weight
single_layers.#.mlp.c_proj.weight = single_transformer_blocks.#.ff.out_projection.weight
single_layers.#.modCX.1.weight = single_transformer_blocks.#.norm1.linear.weight
modF.1.weight ~ norm_out.linear.weight
final_linear.weight = proj_out.weight
"""

_ANY = "{context_refiner,noise_refiner,layers}"

LUMINA2 = """
norm_final.weight -
x_embedder.*
cap_embedder.0.weight = time_caption_embed.caption_embedder.0.weight
cap_embedder.1.* = time_caption_embed.caption_embedder.1.*
t_embedder.mlp.0.* = time_caption_embed.timestep_embedder.linear_1.*
t_embedder.mlp.2.* = time_caption_embed.timestep_embedder.linear_2.*
ANY.#.attention.qkv.weight = ANY.#.attn.{to_q:D+to_k+to_v}.weight
ANY.#.attention.out.weight = ANY.#.attn.to_out.0.weight
ANY.#.attention.{q,k}_norm.weight = ANY.#.attn.norm_{q,k}.weight
ANY.#.feed_forward.w{1,2,3}.weight = ANY.#.feed_forward.linear_{1,2,3}.weight
ANY.#.ffn_norm{1,2}.weight
ANY.#.attention_norm2.weight = ANY.#.norm2.weight
context_refiner.#.attention_norm1.weight = context_refiner.#.norm1.weight
{noise_refiner,layers}.#.attention_norm1.weight = {noise_refiner,layers}.#.norm1.norm.weight
{noise_refiner,layers}.#.adaLN_modulation.1.* = {noise_refiner,layers}.#.norm1.linear.*
final_layer.adaLN_modulation.1.* = norm_out.linear_1.*
final_layer.linear.* = norm_out.linear_2.*
""".replace("ANY", _ANY)

ZIMAGE = """
norm_final.weight -
{x_pad_token,cap_pad_token}
x_embedder.* = all_x_embedder.2-1.*
cap_embedder.0.weight
cap_embedder.1.*
t_embedder.mlp.{0,2}.*
ANY.#.attention.qkv.weight = ANY.#.attention.{to_q:D+to_k+to_v}.weight
ANY.#.attention.out.* = ANY.#.attention.to_out.0.*
ANY.#.attention.{q,k}_norm.weight = ANY.#.attention.norm_{q,k}.weight
ANY.#.{attention,ffn}_norm{1,2}.weight
ANY.#.feed_forward.w{1,2,3}.weight
{noise_refiner,layers}.#.adaLN_modulation.0.*
final_layer.adaLN_modulation.1.* = all_final_layer.2-1.adaLN_modulation.1.*
final_layer.linear.* = all_final_layer.2-1.linear.*
""".replace("ANY", _ANY)

_KREA2_BLOCK = "".join(
    f"""
{old}.#.attn.w{{q,k,v}}.weight = {new}.#.attn.to_{{q,k,v}}.weight
{old}.#.attn.wo.weight = {new}.#.attn.to_out.0.weight
{old}.#.attn.gate.weight = {new}.#.attn.to_gate.weight
{old}.#.attn.qknorm.{{q,k}}norm.scale = {new}.#.attn.norm_{{q,k}}.weight
{old}.#.mlp.{{gate,up,down}}.weight = {new}.#.ff.{{gate,up,down}}.weight
{old}.#.prenorm.scale = {new}.#.norm1.weight
{old}.#.postnorm.scale = {new}.#.norm2.weight
"""
    for old, new in (
        ("blocks", "transformer_blocks"),
        ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
        ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
    )
)

KREA2 = f"""
{_KREA2_BLOCK}
first.* = img_in.*
tmlp.0.* = time_embed.linear_1.*
tmlp.2.* = time_embed.linear_2.*
tproj.1.* = time_mod_proj.*
txtmlp.0.scale = txt_in.norm.weight
txtmlp.1.* = txt_in.linear_1.*
txtmlp.3.* = txt_in.linear_2.*
txtfusion.projector.* = text_fusion.projector.*
blocks.#.mod.lin = transformer_blocks.#.scale_shift_table (6, -1)
last.linear.* = final_layer.linear.*
last.norm.scale = final_layer.norm.weight
last.modulation.lin = final_layer.scale_shift_table
"""


def _unet() -> str:
    """Stable Diffusion 1.5: four levels of two blocks down and three up, numbered through; attention on the upper
    three levels.
    """
    residual = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    }  # fmt: skip
    inside = (
        "norm.*", "proj_{in,out}.*", "transformer_blocks.0.norm{1,2,3}.*",
        "transformer_blocks.0.attn{1,2}.to_{q,k,v}.weight",
        "transformer_blocks.0.attn{1,2}.to_out.0.*", "transformer_blocks.0.ff.net.0.proj.*",
        "transformer_blocks.0.ff.net.2.*",
    )  # fmt: skip
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions, lines = {"middle_block.1": "mid_block.attentions.0"}, []
    for level in range(4):
        blocks = {f"input_blocks.{3 * level + 1 + i}": f"down_blocks.{level}.PART.{i}" for i in range(2)}
        blocks |= {f"output_blocks.{3 * level + i}": f"up_blocks.{level}.PART.{i}" for i in range(3)}
        resnets |= {f"{old}.0": new.replace("PART", "resnets") for old, new in blocks.items()}
        attended = {old: new for old, new in blocks.items() if level != (3 if old.startswith("input") else 0)}
        attentions |= {f"{old}.1": new.replace("PART", "attentions") for old, new in attended.items()}
        if level < 3:
            lines.append(f"input_blocks.{3 * level + 3}.0.op.* = down_blocks.{level}.downsamplers.0.conv.*")
            lines.append(
                f"output_blocks.{3 * level + 2}.{min(level, 1) + 1}.conv.* = up_blocks.{level}.upsamplers.0.conv.*"
            )
    lines += [f"{old}.{a}.* = {new}.{b}.*" for old, new in resnets.items() for a, b in residual.items()]
    lines += [f"{old}.{name} = {new}.{name}" for old, new in attentions.items() for name in inside]
    return "\n".join(lines)


UNET = f"""
{_unet()}
time_embed.0.* = time_embedding.linear_1.*
time_embed.2.* = time_embedding.linear_2.*
input_blocks.0.0.* = conv_in.*
out.0.* = conv_norm_out.*
out.2.* = conv_out.*
"""

# (family, layout) -> (the table, the tensor of the original layout whose rows are the model's width D)
TABLES: dict[tuple[str, str], tuple[str, str]] = {
    ("flux", "bfl"): (FLUX, "img_in.weight"),
    ("chroma", "bfl"): (CHROMA, "img_in.weight"),
    ("flux2", "bfl"): (FLUX2, "img_in.weight"),
    ("sd3", "original"): (SD3, "x_embedder.proj.weight"),
    ("sana", "original"): (SANA, "x_embedder.proj.weight"),
    ("sana-sprint", "original"): (SANA_SPRINT, "x_embedder.proj.weight"),
    ("auraflow", "original"): (AURAFLOW, "init_x_linear.weight"),
    ("lumina2", "original"): (LUMINA2, "x_embedder.weight"),
    ("zimage", "original"): (ZIMAGE, "x_embedder.weight"),
    ("krea2", "original"): (KREA2, "first.weight"),
    ("unet", "original"): (UNET, "input_blocks.0.0.weight"),
}
