"""The adapter behind five families of VLMs: identity at step 0, no mixing of samples, generation with and without cache, save and load."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (AutoModelForImageTextToText, InternVLConfig, LlavaOnevisionConfig, Qwen2_5_VLConfig, Qwen3VLConfig, SmolVLMConfig)

from adapter import SceneLatents, SpatialVLM, build_adapter, build_tokenizer, load_spatial_vlm, load_vlm, mini_vlm, save_mini_vlm, save_spatial_vlm
from model import InputError
from psfm import PSFM, load_psfm
from vggt import VGGT, VGGTConfig

IMAGE, VOCABULARY = 90, 100     # the placeholder's id
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, max_position_embeddings=512)


def qwen(config, vision):
    mrope = dict(rope_type='default', rope_theta=10000.0, mrope_section=[2, 3, 3])
    return config(text_config=dict(TEXT, rope_parameters=mrope, head_dim=16), vision_config=vision, image_token_id=IMAGE, video_token_id=91,
                  vision_start_token_id=92, vision_end_token_id=93, pad_token_id=0)


CONFIGS = {
    'qwen2.5-vl': lambda: qwen(Qwen2_5_VLConfig, dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, temporal_patch_size=1,
                                                       window_size=32, fullatt_block_indexes=[1], out_hidden_size=64)),
    'qwen3-vl': lambda: qwen(Qwen3VLConfig, dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, temporal_patch_size=1, out_hidden_size=64,
                                                 deepstack_visual_indexes=[0], num_position_embeddings=16)),
    'internvl': lambda: InternVLConfig(text_config=dict(TEXT, model_type='qwen2'), image_token_id=IMAGE, image_seq_length=4,
                                       vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])),
    'llava-onevision': lambda: LlavaOnevisionConfig(text_config=dict(TEXT, model_type='qwen2'), image_token_id=IMAGE, video_token_id=91, image_grid_pinpoints=[[32, 32]],
                                                    vision_config=dict(model_type='siglip_vision_model', hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                                                       num_attention_heads=2, image_size=32, patch_size=8)),
    'smolvlm': lambda: SmolVLMConfig(text_config=dict(TEXT, model_type='llama'), image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
                                     vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8))}
FAMILIES = list(CONFIGS)


def make_vlm(family):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()


def make_batch(family, counts, seed=0):
    """Inputs for samples with `counts` pictures of 32 x 32 pixels each. Every sample is drawn on its own."""
    rows, pixels = [], []
    for i, count in enumerate(counts):
        g = torch.Generator().manual_seed(100 * seed + i)
        rows.append((torch.randint(3, 80, (6,), generator=g), count))
        pixels.append(torch.rand(count, 3, 32, 32, generator=g) + 0.01)
    # placeholders a picture: 16 patches merged by 2 x 2; LLaVA-OneVision does not merge, and of one picture alone adds a tile and line ends
    sequences = []
    for words, count in rows:
        n = 4 if family != 'llava-onevision' else 36 if count == 1 else 17
        sequences.append(torch.cat([words[:2], *[torch.tensor([88, *[IMAGE] * n, 89])] * count, words[2:]]))
    longest = max(map(len, sequences))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(s), dtype=torch.long), s]) for s in sequences])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s), dtype=torch.long), torch.ones(len(s), dtype=torch.long)]) for s in sequences])
    batch = dict(input_ids=ids, attention_mask=mask)
    images = torch.cat(pixels)
    if not len(images):
        return batch
    if family.startswith('qwen'):
        patches = images.view(-1, 3, 2, 2, 8, 2, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 192)
        batch.update(pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 4]]).expand(len(images), 3), mm_token_type_ids=(ids == IMAGE).int())
    elif family == 'internvl':
        batch.update(pixel_values=images)
    elif family == 'llava-onevision':
        batch.update(pixel_values=images[:, None].expand(-1, 2, -1, -1, -1), image_sizes=torch.tensor([[32, 32]]).expand(len(images), 2),
                     batch_num_images=torch.tensor([count for count in counts if count]))
    else:
        padded = torch.zeros(len(counts), max(counts), 3, 32, 32)
        for row, picture in zip(padded, pixels):
            row[:len(picture)] = picture
        batch.update(pixel_values=padded)
    return batch


def make_latents(counts, seed=0):
    return [torch.randn(5, 24, generator=torch.Generator().manual_seed(seed + i)) if count else None for i, count in enumerate(counts)]


def with_adapter(family, awake=True):
    vlm = make_vlm(family)
    adapter = build_adapter(vlm, 24)
    if awake:
        torch.nn.init.normal_(adapter.mlp.fc2.weight, std=0.5)
    return SpatialVLM(vlm, adapter).eval()


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_is_the_plain_vlm_at_step_0(family):
    batch = make_batch(family, [2, 0, 1])
    plain = make_vlm(family)(**batch).logits
    model = with_adapter(family, awake=False)
    assert torch.equal(model(latents=make_latents([2, 0, 1]), **batch).logits, plain)
    torch.nn.init.normal_(model.adapter.mlp.fc2.weight, std=0.5)                          # ... and the latents do arrive
    assert (model(latents=make_latents([2, 0, 1]), **batch).logits - plain)[[0, 2]].abs().max() > 1e-3
    assert torch.equal(model(**batch).logits, plain)                                      # nothing is left behind by the call before


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_batch_mates_change_nothing(family):
    counts = [2, 0, 1]
    model, batch, latents = with_adapter(family), make_batch(family, counts), make_latents(counts)
    together = model(latents=latents, **batch).logits
    other = model(latents=[latents[0], None, latents[2] + 1], **batch).logits             # another sample's latents
    assert torch.allclose(together[0], other[0], atol=1e-5) and not torch.allclose(together[2], other[2], atol=1e-3)
    for i, count in enumerate(counts[:1]):                                                # the sample on its own
        alone = model(latents=latents[i:i + 1], **make_batch(family, [count])).logits
        assert torch.allclose(together[i, -alone.shape[1]:], alone[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_generate_is_argmax_of_forward(family):
    model, batch, latents = with_adapter(family), make_batch(family, [1]), make_latents([1])
    # this tiny random model must not end early
    answer = model.generate(latents=latents, max_new_tokens=4, min_new_tokens=4, do_sample=False, **batch)[0, batch['input_ids'].shape[1]:]
    # ... and now without a cache
    extend = lambda x, value: torch.cat([x, torch.full_like(x[:, :1], value)], 1)
    grown, found = dict(batch), []
    for _ in range(4):
        logits = model(latents=latents, **grown).logits[0, -1]
        logits[2] = -torch.inf                                                            # the end, as min_new_tokens forbids it
        found.append(logits.argmax().item())
        grown.update(input_ids=extend(grown['input_ids'], found[-1]), attention_mask=extend(grown['attention_mask'], 1))
        if 'mm_token_type_ids' in grown:
            grown['mm_token_type_ids'] = extend(grown['mm_token_type_ids'], 0)
    assert answer.tolist() == found


def test_gradients_reach_the_adapter_alone():
    model, batch = with_adapter('qwen2.5-vl').trainable('adapter'), make_batch('qwen2.5-vl', [2, 1])
    model(latents=make_latents([2, 1]), **batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())
    assert all(p.grad is None for p in model.vlm.parameters())
    model.trainable('adapter+llm')
    model(latents=make_latents([2, 1]), **batch).logits.square().mean().backward()
    trained = {name.split('.')[1] for name, p in model.vlm.named_parameters() if p.grad is not None}
    assert trained <= {'language_model', 'weight'} and all(p.grad is None for p in model.vlm.model.visual.parameters())


def test_wrong_numbers_of_latents_are_refused():
    model, batch = with_adapter('qwen2.5-vl'), make_batch('qwen2.5-vl', [2, 1])
    with pytest.raises(InputError, match='latents of 1 samples for a batch of 2'):
        model(latents=make_latents([2]), **batch)


# -----------------------------------------------------------------------------
# the mini VLM, Chat, files

CONTENT = ['table', 'ball']
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)) for i in range(3)]


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(['How many table(s) are there?', 'Is the ball left of the table?'] * 20, CONTENT)
    vlm, chat = mini_vlm(tokenizer, width=64, depth=1)
    path = str(tmp_path_factory.mktemp('vlm') / 'mini.safetensors')
    save_mini_vlm(vlm, chat, path, dict(width=64, depth=1))
    return vlm.eval(), chat, path


def talk(*turns, pictures=0):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(turns)]
    return dict(images=PICTURES[:pictures], conversations=turns)


def test_labels_are_the_answers_and_their_ends(mini):
    _, chat, _ = mini
    encoded = chat.encode(talk('<image><image>How many table(s) are there?', '12', 'Is the ball left of the table?', 'table', pictures=2))
    text = chat.tokenizer.decode([token for token in encoded['labels'] if token != -100])
    assert text == '12<|im_end|>table<|im_end|>'
    for token, label in zip(encoded['input_ids'], encoded['labels']):
        assert label in (-100, token)
    assert encoded['input_ids'].count(chat.image_token_id) == 2 * 16
    assert chat.tokenizer.decode(encoded['input_ids']).endswith('assistant\ntable<|im_end|>\n')


def test_a_question_is_laid_out_for_its_answer(mini):
    _, chat, _ = mini
    asked = chat.encode(talk('How many table(s) are there?'))
    told = chat.encode(talk('How many table(s) are there?', '3'))
    assert told['input_ids'][:len(asked['input_ids'])] == asked['input_ids'] and set(asked['labels']) == {-100}


def test_more_tokens_than_pictures(mini):
    with pytest.raises(InputError, match='2 <image> tokens for 1 images'):
        mini[1].encode(talk('<image><image>How many table(s) are there?', '1', pictures=1))


def test_stock_phrases_are_single_tokens(mini):
    ids = mini[1].tokenizer('How many table(s) are there?', add_special_tokens=False).input_ids
    assert len(ids) == 3 and mini[1].tokenizer.decode(ids) == 'How many table(s) are there?'


@torch.no_grad()
def test_save_and_load(mini, tmp_path):
    vlm, chat, path = mini
    again, _ = load_vlm(path)
    half = {name: x.half().float() for name, x in vlm.state_dict().items()}
    assert all(torch.equal(x, half[name]) for name, x in again.state_dict().items())
    model = SpatialVLM(again, build_adapter(again, 24)).eval()
    settings = dict(vlm=path, latents='psfm', encoder='')
    batch = chat.batch([chat.encode(talk('<image>How many table(s) are there?', pictures=1))])
    del batch['labels']
    z = make_latents([1])
    for with_vlm in (False, True):
        folder = str(tmp_path / f'{with_vlm}')
        save_spatial_vlm(model, chat, folder, settings, with_vlm)
        loaded, chat2, found = load_spatial_vlm(folder)
        loaded.eval()
        assert found['latents'] == 'psfm' and found['latent_width'] == 24
        assert torch.equal(loaded(latents=z, **batch).logits, again(**batch).logits)      # still itself: the last layer is still zero
        torch.nn.init.normal_(loaded.adapter.mlp.fc2.weight)
        save_spatial_vlm(loaded, chat2, folder + '2', found if not with_vlm else settings, with_vlm)
        assert torch.equal(load_spatial_vlm(folder + '2')[0].eval()(latents=z, **batch).logits, loaded(latents=z, **batch).logits)


def test_a_checkpoint_without_its_adapter_is_refused(mini, tmp_path):
    vlm, chat, path = mini
    save_spatial_vlm(SpatialVLM(vlm, None), chat, str(tmp_path), dict(vlm=path, latents='psfm', encoder='', latent_width=24), with_vlm=False)
    with pytest.raises(InputError, match='adapter.safetensors'):
        load_spatial_vlm(str(tmp_path))
    with pytest.raises(InputError, match='not a fine-tuned Spa3-VLM'):
        load_spatial_vlm(str(tmp_path / 'nothing'))


# -----------------------------------------------------------------------------
# latents once a scene

def test_latents_are_kept_and_never_stale(tmp_path):
    shipped = 'weights/psfm_small.safetensors'
    first = SceneLatents('psfm', shipped, str(tmp_path))
    a = first([PICTURES, [], PICTURES[:2]])
    assert a[0].shape == (32, 128) and a[1] is None and (first.computed, first.found) == (2, 0)
    again = SceneLatents('psfm', shipped, str(tmp_path))
    b = again([PICTURES, [], PICTURES[:2]])
    assert (again.computed, again.found) == (0, 2) and torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    plain = SceneLatents('psfm', shipped)([PICTURES])[0]
    assert torch.equal(plain, a[0])
    other = [PICTURES[1], PICTURES[0], PICTURES[2]]                                       # other pictures, another kind, other weights: none is found
    assert again([other]) and again.computed == 1
    random = SceneLatents('random', shipped, str(tmp_path))
    random([PICTURES])
    assert (random.computed, random.found) == (1, 0)
    first.psfm.encoder.queries.data += 1
    for file in tmp_path.rglob('*.safetensors'):                                          # a broken file is written anew
        file.write_bytes(b'broken')
    c = again([PICTURES])
    assert torch.equal(c[0], a[0]) and again.computed == 2
    backbone = SceneLatents('backbone', shipped, str(tmp_path))
    assert backbone([PICTURES])[0].shape == (3 * 16, 256)


def test_no_room_for_latents(tmp_path, capsys):
    blocked = tmp_path / 'file'
    blocked.write_text('not a folder')
    said = []
    latents = SceneLatents('psfm', 'weights/psfm_small.safetensors', str(blocked / 'cache'), say=said.append)
    assert latents([PICTURES])[0] is not None and latents([PICTURES])[0] is not None
    assert len(said) == 1 and 'can no longer be kept' in said[0]


# -----------------------------------------------------------------------------
# what the release offers, in miniature

OURS_TO_THEIRS = [('projector.fc1', 'geometry_projector.0'), ('projector.fc2', 'geometry_projector.2'), ('attention', 'geom_cross_attention'), ('norm', 'ln'),
                  ('mlp.fc1', 'geometry_adaptor.0'), ('mlp.fc2', 'geometry_adaptor.2'), ('gate', 'geometry_gate.0')]
PSFM_TO_THEIRS = [('encoder.projection.', 'projection.'), ('encoder.queries', 'query_embed.weight'), ('encoder.transformer.', 'encoder.'),
                  ('decoder.ray_embed.', 'pose_tokenizer.'), ('decoder.transformer.', 'decoder.'), ('backbone.', '')]


def under(name, table):
    ours, theirs = next((pair for pair in table if name.startswith(pair[0])), ('', ''))
    return theirs + name.removeprefix(ours)


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A tiny Spa3R under the release's names: spa3r.ckpt, and the model it came from."""
    torch.manual_seed(0)
    vggt = VGGT(VGGTConfig(width=64, depth=2, num_heads=1, embed_depth=1, embed_heads=1, position_grid=4, global_qk_norm='rms', camera_depth=1, camera_heads=1,
                           heads=('camera',)))
    psfm = PSFM(vggt, 128, 1, 1, 2, 6, standardised=False).eval()
    state = {f'model.{under(name, PSFM_TO_THEIRS)}': tensor for name, tensor in psfm.state_dict().items() if not name.startswith('geo_')}
    state.update({'model.dino.cls_token': torch.zeros(1), 'model.heads.sem.fc1.weight': torch.zeros(3, 3)})
    path = str(tmp_path_factory.mktemp('released') / 'spa3r.ckpt')
    torch.save(dict(state_dict=state, epoch=3), path)
    return path, psfm


@torch.no_grad()
def test_released_encoder(released):
    path, psfm = released
    again, config = load_psfm(path)
    images = torch.rand(1, 2, 3, 28, 42)
    assert torch.allclose(again.latents(images), psfm.latents(images), atol=1e-5) and config.width == 128
    with pytest.raises(InputError, match='holds no released Spa3R'):
        torch.save(dict(state_dict={'x': torch.zeros(1)}), path + '.pt')
        load_psfm(path + '.pt')


@torch.no_grad()
def test_released_vlm(released, mini, tmp_path):
    path, psfm = released
    vlm, chat, _ = mini
    adapter = build_adapter(vlm, 128)
    torch.nn.init.normal_(adapter.mlp.fc2.weight)
    vlm.save_pretrained(tmp_path)
    chat.save_pretrained(tmp_path)
    state = {under(name, [('model.visual.', 'visual.'), ('model.language_model.', 'model.')]): x for name, x in vlm.state_dict().items() if name != 'lm_head.weight'}
    state.update({under(name, OURS_TO_THEIRS): x for name, x in adapter.state_dict().items()})
    state.update({name.replace('model.', 'geometry_encoder.spa3r.', 1): x for name, x in torch.load(path, weights_only=True)['state_dict'].items()})
    save_file({name: x.contiguous() for name, x in state.items()}, str(tmp_path / 'model.safetensors'), dict(format='pt'))

    model, chat, settings = load_spatial_vlm(str(tmp_path))
    batch = chat.batch([chat.encode(talk('<image>How many table(s) are there?', pictures=1))])
    del batch['labels']
    latents = SceneLatents('psfm', settings['encoder'])
    latents.config.image_width = 56
    z = latents([PICTURES[:1]])
    assert torch.equal(model.eval()(latents=z, **batch).logits, SpatialVLM(vlm, adapter).eval()(latents=z, **batch).logits)
    del state['geom_cross_attention.q_norm.weight']
    save_file({name: x.contiguous() for name, x in state.items()}, str(tmp_path / 'model.safetensors'), dict(format='pt'))
    with pytest.raises(InputError, match='no adapter of a Spa3-VLM'):
        load_spatial_vlm(str(tmp_path))
