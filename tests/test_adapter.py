"""The adapter behind five families of VLMs: identity at step 0, no mixing of samples, generation
with and without cache, save and load; conversations as the VLM reads them; latents once a scene."""
import contextlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from transformers import (AutoModelForImageTextToText, InternVLConfig, LlavaOnevisionConfig,
                          Qwen2_5_VLConfig, Qwen3VLConfig, SmolVLMConfig)

from adapter import (Reading, SceneLatents, SpatialVLM, build_adapter, cameras_around,
                     load_spatial_vlm, save_spatial_vlm)
from benchmarks import generate
from chat import Chat, answer_loss, lean_batch, load_vlm, states_kept
from common import InputError
from mini_vlm import build_tokenizer, build_vlm, save_mini_vlm
from model import compile_blocks, invert_pose
from probe import Sight
from psfm import load_psfm

IMAGE, VOCABULARY = 90, 100     # the placeholder's id
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=512)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8)
QWEN_VISION = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8,
                   temporal_patch_size=1, out_hidden_size=64)


def qwen(config, **vision):
    mrope = dict(rope_type='default', rope_theta=10000.0, mrope_section=[2, 3, 3])
    return config(text_config=dict(TEXT, rope_parameters=mrope, head_dim=16),
                  vision_config=dict(QWEN_VISION, **vision), image_token_id=IMAGE,
                  video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
                  pad_token_id=0)


def internvl():
    vision = dict(VISION, image_size=[32, 32], patch_size=[8, 8])
    return InternVLConfig(text_config=dict(TEXT, model_type='qwen2'), image_token_id=IMAGE,
                          image_seq_length=4, vision_config=vision)


def llava_onevision():
    vision = dict(VISION, model_type='siglip_vision_model', num_hidden_layers=3)
    return LlavaOnevisionConfig(text_config=dict(TEXT, model_type='qwen2'), image_token_id=IMAGE,
                                video_token_id=91, image_grid_pinpoints=[[32, 32]],
                                vision_config=vision)


def smolvlm():
    return SmolVLMConfig(text_config=dict(TEXT, model_type='llama'), image_token_id=IMAGE,
                         scale_factor=2, pad_token_id=0, vision_config=VISION)


CONFIGS = {
    'qwen2.5-vl': lambda: qwen(Qwen2_5_VLConfig, window_size=32, fullatt_block_indexes=[1]),
    'qwen3-vl': lambda: qwen(Qwen3VLConfig, deepstack_visual_indexes=[0],
                             num_position_embeddings=16),
    'internvl': internvl,
    'llava-onevision': llava_onevision,
    'smolvlm': smolvlm}
FAMILIES = list(CONFIGS)


def make_vlm(family):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()


def make_batch(family, counts):
    """Inputs for samples with `counts` pictures of 32 x 32 pixels each, each sample on its own."""
    words, pixels = [], []
    for i, count in enumerate(counts):
        g = torch.Generator().manual_seed(i)
        words.append(torch.randint(3, 80, (6,), generator=g))
        pixels.append(torch.rand(count, 3, 32, 32, generator=g) + 0.01)

    # placeholders a picture: 16 patches merged by 2 x 2; LLaVA-OneVision does not merge, and of
    # one picture alone adds a tile and line ends
    sequences = []
    for text, count in zip(words, counts):
        n = 4
        if family == 'llava-onevision':
            n = 36 if count == 1 else 17
        picture = torch.tensor([88, *[IMAGE] * n, 89])
        sequences.append(torch.cat([text[:2], *[picture] * count, text[2:]]))
    longest = max(map(len, sequences))
    ids = torch.zeros(len(counts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, longest - len(sequence):] = sequence
        mask[i, longest - len(sequence):] = 1
    batch = dict(input_ids=ids, attention_mask=mask)

    images = torch.cat(pixels)
    if not len(images):
        return batch
    if family.startswith('qwen'):
        patches = images.view(-1, 3, 2, 2, 8, 2, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
        grid = torch.tensor([[1, 4, 4]]).expand(len(images), 3)
        batch.update(pixel_values=patches.reshape(-1, 192), image_grid_thw=grid,
                     mm_token_type_ids=(ids == IMAGE).int())
    elif family == 'internvl':
        batch.update(pixel_values=images)
    elif family == 'llava-onevision':
        batch.update(pixel_values=images[:, None].expand(-1, 2, -1, -1, -1),
                     image_sizes=torch.tensor([[32, 32]]).expand(len(images), 2),
                     batch_num_images=torch.tensor([count for count in counts if count]))
    else:
        padded = torch.zeros(len(counts), max(counts), 3, 32, 32)
        for row, picture in zip(padded, pixels):
            row[:len(picture)] = picture
        batch.update(pixel_values=padded)
    return batch


def make_latents(counts):
    generators = [torch.Generator().manual_seed(i) for i in range(len(counts))]
    return [torch.randn(5, 24, generator=g) if count else None
            for g, count in zip(generators, counts)]


def with_adapter(family, awake=True):
    vlm = make_vlm(family)
    adapter = build_adapter(vlm, 24)
    if awake:
        torch.nn.init.normal_(adapter.mlp.fc2.weight, std=0.5)
    return SpatialVLM(vlm, adapter).eval()


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_is_the_plain_vlm_at_step_0(family):
    batch, latents = make_batch(family, [2, 0, 1]), make_latents([2, 0, 1])
    plain = make_vlm(family)(**batch).logits
    model = with_adapter(family, awake=False)
    assert torch.equal(model(latents=latents, **batch).logits, plain)

    # ... and the latents do arrive
    torch.nn.init.normal_(model.adapter.mlp.fc2.weight, std=0.5)
    change = model(latents=latents, **batch).logits - plain
    assert change[[0, 2]].abs().max() > 1e-3

    # nothing is left behind by the call before
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_batch_mates_change_nothing(family):
    counts = [2, 0, 1]
    model, batch = with_adapter(family), make_batch(family, counts)
    latents = make_latents(counts)
    together = model(latents=latents, **batch).logits

    # another sample's latents
    other = model(latents=[latents[0], None, latents[2] + 1], **batch).logits
    assert torch.allclose(together[0], other[0], atol=1e-5)
    assert not torch.allclose(together[2], other[2], atol=1e-3)

    # the sample on its own
    alone = model(latents=latents[:1], **make_batch(family, counts[:1])).logits
    assert torch.allclose(together[0, -alone.shape[1]:], alone[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_generate_is_argmax_of_forward(family):
    model, batch, latents = with_adapter(family), make_batch(family, [1]), make_latents([1])
    # this tiny random model must not end early
    ids = model.generate(latents=latents, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                         **batch)
    answer = ids[0, batch['input_ids'].shape[1]:]

    # ... and now without a cache
    def extend(x, value):
        return torch.cat([x, torch.full_like(x[:, :1], value)], 1)

    grown, found = dict(batch), []
    for _ in range(4):
        logits = model(latents=latents, **grown).logits[0, -1]
        logits[2] = -torch.inf  # the end, as min_new_tokens forbids it
        found.append(logits.argmax().item())
        grown.update(input_ids=extend(grown['input_ids'], found[-1]),
                     attention_mask=extend(grown['attention_mask'], 1))
        if 'mm_token_type_ids' in grown:
            grown['mm_token_type_ids'] = extend(grown['mm_token_type_ids'], 0)
    assert answer.tolist() == found


@pytest.mark.slow
@pytest.mark.parametrize('family, checkpointing', [
    *((family, False) for family in FAMILIES), ('qwen2.5-vl', True)])
def test_compiled_blocks_do_what_they_did(family, checkpointing, restored_compiler):
    model = with_adapter(family).train().train_only('adapter+llm')
    decoder = model.vlm.get_decoder()
    if checkpointing:
        decoder.gradient_checkpointing_enable(dict(use_reentrant=False))
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(counts):
        with states_kept(model.vlm) as states:
            out = model(latents=make_latents(counts), use_cache=False, **make_batch(family, counts))
        gradients = torch.autograd.grad(out.logits.square().mean(), trained, allow_unused=True)
        return [out.logits, *states, *[x for x in gradients if x is not None]]

    eager = run((1, 2)), run((2, 3, 1))
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(decoder, type(decoder.layers[0]), 'aot_eager')
    compiled = run((1, 2)), run((2, 3, 1))
    assert 1 <= counters['stats']['unique_graphs'] <= 2 and not counters['graph_break']
    for one, other in zip(sum(compiled, []), sum(eager, [])):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert len(compiled[0]) == len(eager[0]) > len(decoder.layers) + 1


def test_gradients_reach_the_adapter_alone():
    model = with_adapter('qwen2.5-vl').train_only('adapter')
    batch, latents = make_batch('qwen2.5-vl', [2, 1]), make_latents([2, 1])
    model(latents=latents, **batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())
    assert all(p.grad is None for p in model.vlm.parameters())

    model.train_only('adapter+llm')
    model(latents=latents, **batch).logits.square().mean().backward()
    trained = {name.split('.')[1] for name, p in model.vlm.named_parameters()
               if p.grad is not None}
    assert 'language_model' in trained
    assert trained <= {'language_model', 'weight'}
    assert all(p.grad is None for p in model.vlm.model.visual.parameters())


def test_without_a_picture_the_adapter_has_gradients_of_zero():
    """... for which DDP would wait."""
    model, batch = with_adapter('qwen2.5-vl').train(), make_batch('qwen2.5-vl', [0])
    model(latents=[None], **batch).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.adapter.parameters())


def test_wrong_numbers_of_latents_are_refused():
    model, batch = with_adapter('qwen2.5-vl'), make_batch('qwen2.5-vl', [2, 1])
    with pytest.raises(InputError, match='latents of 1 samples for a batch of 2'):
        model(latents=make_latents([2]), **batch)


# -----------------------------------------------------------------------------
# Chat, files

COUNT = 'How many table(s) are there?'
SIDE = 'Is the ball left of the table?'
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8))
            for i in range(3)]


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    """A tiny Qwen2.5-VL, its Chat, its folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([COUNT, SIDE] * 20, ['table', 'ball'])
    vlm, chat = build_vlm(tokenizer, width=64, depth=1)
    folder = str(tmp_path_factory.mktemp('vlm') / 'mini')
    save_mini_vlm(vlm, chat, Sight(64), folder)
    return vlm.eval(), chat, folder


def talk(*texts, pictures=0):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]
    return dict(images=PICTURES[:pictures], conversations=turns)


def asked(chat):
    """One question about one picture, as a batch."""
    batch = chat.batch([chat.encode(talk(f'<image>{COUNT}', pictures=1))])
    del batch['labels']
    return batch


@pytest.mark.parametrize('with_latents', [False, True])
def test_questions_that_share_their_pictures_get_the_same_answers(mini, with_latents):
    """Reading against generate: any order, several lengths, several scenes, asked twice."""
    vlm, chat, folder = mini
    torch.manual_seed(0)
    adapter = build_adapter(vlm, 16) if with_latents else None
    if adapter:
        torch.nn.init.normal_(adapter.mlp.fc2.weight)
    model = SpatialVLM(load_vlm(folder)[0], adapter).eval()
    for p in model.vlm.parameters():  # one that says something
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    scenes = [PICTURES[:2], PICTURES[1:]]
    z = list(torch.randn(2, 5, 16)) if with_latents else None
    questions = [(1, COUNT), (0, SIDE), (0, 'table ball table ' + COUNT), (1, SIDE), (0, COUNT)]
    expected = []
    for scene, question in questions:
        item = dict(talk(f'<image><image>{question}'), images=scenes[scene])
        expected += generate(model, chat, z and [z[scene]], [item], 8)
    reading = Reading(model, chat, scenes, z, contextlib.nullcontext())
    assert reading.answer(questions, 8) == expected
    assert reading.answer(questions[:2], 8) == expected[:2]
    assert len(set(expected)) >= 3
    assert any(len(answer.split()) > 2 for answer in expected)
    large = [picture.resize((64, 128)) for picture in PICTURES[:2]]
    with pytest.raises(InputError, match='differ in number or size'):
        Reading(model, chat, [PICTURES[:2], large], None, contextlib.nullcontext())


def test_padding_is_right_to_train_and_left_to_continue(mini):
    _, chat, _ = mini
    items = [chat.encode(talk(COUNT, '3')), chat.encode(talk(COUNT, '3', SIDE, 'table'))]
    for left in (False, True):
        batch = chat.batch(items, left=left)
        rows = batch['input_ids'][batch['attention_mask'].bool()].tolist()
        assert rows == items[0]['input_ids'] + items[1]['input_ids']
        assert batch['attention_mask'][0, 0] == (not left)
        assert (batch['labels'] != -100).sum() == 6


def test_a_limit_of_pixels_makes_large_pictures_smaller_and_none_larger(mini):
    vlm, chat, _ = mini
    item = talk(f'<image>{COUNT}', pictures=1)
    for limit, tokens in ((None, 16), (518 * 518, 16), (32 * 32, 4)):
        limited = Chat(vlm.config, chat.tokenizer, chat.image_processor, limit)
        assert limited.encode(item)['input_ids'].count(chat.image_token_id) == tokens


@torch.no_grad()
def test_batches_for_training_change_no_logits(mini):
    vlm, chat, _ = mini
    items = [talk(f'<image>{COUNT}', '3', pictures=1), talk(f'<image>{COUNT}', '3', SIDE, 'table',
                                                            pictures=1)]
    batch = chat.batch([chat.encode(item) for item in items])
    quick = lean_batch(dict(batch), vlm, 'cpu')
    labels = batch.pop('labels')[:, 1:]
    assert not batch['attention_mask'].all()  # the first is padded
    plain = vlm(**batch).logits[:, :-1]
    few, expected = quick.pop('labels'), labels[labels != -100]
    logits = vlm(**quick).logits
    assert logits.shape[1] < plain.shape[1] / 4
    assert torch.equal(few[few != -100], expected)
    assert torch.allclose(plain[labels != -100], logits[few != -100], atol=1e-6)
    assert answer_loss(plain, labels).item() == pytest.approx(answer_loss(logits, few).item())


@torch.no_grad()
def test_save_and_load(mini, tmp_path):
    _, _, vlm_folder = mini
    vlm, chat = load_vlm(vlm_folder)
    model = SpatialVLM(vlm, build_adapter(vlm, 24)).eval()
    settings = dict(vlm=vlm_folder, latents='psfm', encoder='')
    batch, z = asked(chat), make_latents([1])
    for with_vlm in (False, True):
        folder = str(tmp_path / f'{with_vlm}')
        save_spatial_vlm(model, chat, folder, settings, with_vlm)
        loaded, chat2, found = load_spatial_vlm(folder)
        loaded.eval()
        assert found['latents'] == 'psfm'
        assert found['latent_width'] == 24

        # still itself: the last layer is still zero
        assert torch.equal(loaded(latents=z, **batch).logits, vlm(**batch).logits)

        # ... and no longer
        torch.nn.init.normal_(loaded.adapter.mlp.fc2.weight)
        logits = loaded(latents=z, **batch).logits
        save_spatial_vlm(loaded, chat2, folder + '2', settings, with_vlm)
        again, _, _ = load_spatial_vlm(folder + '2')
        assert torch.equal(again.eval()(latents=z, **batch).logits, logits)
        assert not torch.equal(logits, vlm(**batch).logits)


def test_an_adapter_is_refused_where_its_vlm_was_made_anew(mini, tmp_path):
    _, _, vlm_folder = mini
    made = str(tmp_path / 'made')
    shutil.copytree(vlm_folder, made)
    vlm, chat = load_vlm(made)
    settings = dict(vlm=made, latents='psfm', encoder='')
    model = SpatialVLM(vlm, build_adapter(vlm, 24))
    save_spatial_vlm(model, chat, str(tmp_path / 'run'), settings, with_vlm=False)
    load_spatial_vlm(str(tmp_path / 'run'), torch.bfloat16)  # in any dtype
    with torch.no_grad():
        vlm.get_input_embeddings().weight[0] += 1
    vlm.save_pretrained(made)
    with pytest.raises(InputError, match='made holds another VLM now than the one'):
        load_spatial_vlm(str(tmp_path / 'run'))


def test_a_checkpoint_without_its_adapter_is_refused(mini, tmp_path):
    vlm, chat, folder = mini
    settings = dict(vlm=folder, latents='psfm', encoder='', latent_width=24)
    save_spatial_vlm(SpatialVLM(vlm), chat, str(tmp_path), settings, with_vlm=False)
    with pytest.raises(InputError, match='adapter.safetensors'):
        load_spatial_vlm(str(tmp_path))
    with pytest.raises(InputError, match='not a fine-tuned Spa3-VLM'):
        load_spatial_vlm(str(tmp_path / 'nothing'))
    for content, fault in (('{}', 'does not say what the VLM was made of'),
                           ('[]', 'holds a list, not an object')):
        (tmp_path / 'spatial_vlm.json').write_text(content)
        with pytest.raises(InputError, match=fault):
            load_spatial_vlm(str(tmp_path))


# -----------------------------------------------------------------------------
# latents once a scene

SHIPPED = 'weights/psfm_small.safetensors'


def test_latents_are_kept_and_never_stale(tmp_path):
    psfm, config = load_psfm(SHIPPED)
    first = SceneLatents('psfm', psfm, config, str(tmp_path))
    a = first([PICTURES, [], PICTURES[:2]])
    assert a[0].shape == psfm.encoder.queries.shape
    assert a[1] is None
    assert (first.computed, first.found) == (2, 0)

    again = SceneLatents('psfm', psfm, config, str(tmp_path))
    b = again([PICTURES, [], PICTURES[:2]])
    assert (again.computed, again.found) == (0, 2)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[2], b[2])
    assert torch.equal(SceneLatents('psfm', psfm, config)([PICTURES])[0], a[0])
    again([again.fit(PICTURES)])       # as the processes that read pictures hand them over
    assert (again.computed, again.found) == (0, 3)

    # other pictures, another kind, other weights: none is found
    again([[PICTURES[1], PICTURES[0], PICTURES[2]]])
    assert again.computed == 1
    random = SceneLatents('random', psfm, config, str(tmp_path))
    random([PICTURES])
    assert (random.computed, random.found) == (1, 0)
    changed, _ = load_psfm(SHIPPED)
    changed.encoder.queries.data += 1
    other = SceneLatents('psfm', changed, config, str(tmp_path))
    assert not torch.equal(other([PICTURES])[0], a[0])
    assert (other.computed, other.found) == (1, 0)

    # in bf16 they are nearly the same, in files of their own
    coarse = SceneLatents('psfm', psfm, config, str(tmp_path), dtype=torch.bfloat16)
    z = coarse([PICTURES])[0]
    assert (coarse.computed, coarse.found) == (1, 0)
    assert 0 < (z - a[0]).norm() / a[0].norm() < 0.03

    # a broken file is written anew
    for file in tmp_path.rglob('*.safetensors'):
        file.write_bytes(b'broken')
    assert torch.equal(again([PICTURES])[0], a[0])
    assert again.computed == 2
    assert torch.equal(again([PICTURES])[0], a[0])
    assert again.computed == 2

    pooled = SceneLatents('pooled', psfm, config)
    assert [len(pooled([PICTURES[:n]])[0]) for n in (1, 2, 3)] == [35, 32, 36]
    imagined = SceneLatents('imagined', psfm, config)
    assert imagined([PICTURES])[0].shape == (36, 256)
    origin = imagined.origin
    psfm.decoder.ray_embed.weight.data *= 2       # z is the same, what is decoded from it is not
    assert SceneLatents('imagined', psfm, config).origin != origin
    assert SceneLatents('psfm', psfm, config).origin == first.origin

    backbone = SceneLatents('backbone', psfm, config, str(tmp_path))
    assert backbone([PICTURES])[0].shape == (3 * 16, 256)


def test_cameras_around_stand_in_the_middle_and_look_round():
    walk = torch.eye(3, 4).repeat(1, 4, 1, 1)
    walk[0, :, :, 3] = -torch.tensor([[0.0, 0, 0], [2, 0, 0], [2, 0, 2], [0, 0, 2]])
    ring = cameras_around(walk, 6)[0]
    square = ring[:, :, :3] @ ring[:, :, :3].mT
    assert torch.allclose(square, torch.eye(3).expand(6, 3, 3), atol=1e-6)
    assert torch.allclose(ring[:, :, :3].det(), torch.ones(6), atol=1e-6)
    places = invert_pose(ring)[..., 3]
    assert torch.allclose(places[:5], torch.tensor([1.0, 0, 1]).expand(5, 3), atol=1e-6)
    assert places[5, 1] < -1                              # above: y is down
    ahead = ring[:, 2, :3]
    assert torch.allclose(ahead[0], torch.tensor([0.0, 0, 1]), atol=1e-6)
    assert torch.allclose(ahead[:5].sum(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(ahead[5], torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_no_room_for_latents(tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('not a folder')
    said = []
    latents = SceneLatents('psfm', *load_psfm(SHIPPED), str(blocked / 'cache'), say=said.append)
    assert latents([PICTURES])[0] is not None
    assert latents([PICTURES])[0] is not None
    assert len(said) == 1
    assert 'can no longer be' in said[0]
