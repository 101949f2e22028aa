"""Conversations as every family of VLMs reads them, from the pictures to the answer: tiny random
models with the real classes, templates and tiles. (test_adapter.py has more of Qwen2.5-VL's.)"""
import contextlib
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForImageTextToText, InternVLConfig, PreTrainedTokenizerFast,
                          Qwen2VLConfig, Qwen3VLConfig, SmolVLMConfig)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import finetune
from adapter import (Reading, SpatialVLM, build_adapter, load_spatial_vlm,
                     save_spatial_vlm)
from benchmarks import generate
from chat import answer_loss, as_text, attend_in_fp32, lean_batch, load_vlm
from common import InputError, read_json
from tiny import losses, picture, save_tiny_vlm, turns

TILE = 32      # pixels a side: 16 patches, 4 tokens
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)

# as the hub's folders have them: SmolVLM's beside its processor's settings, InternVL's in a file
# of its own
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = {
    'smolvlm': ['<|im_start|>', '<end_of_utterance>', '<fake_token_around_image>', '<image>',
                '<global-img>', *[f'<row_{i}_col_{j}>' for i in (1, 2) for j in (1, 2)]],
    'internvl': ['<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>', '<video>']}


def bytes_tokenizer(special, **options):
    """Every byte is a token, and so is every special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<pad>', *special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>',
                                   eos_token=special[1], **options)


def save_smolvlm(folder):
    tokenizer = bytes_tokenizer(SPECIAL['smolvlm'])
    config = SmolVLMConfig(
        text_config=dict(TEXT, model_type='llama', vocab_size=len(tokenizer)),
        vision_config=dict(VISION, image_size=TILE, patch_size=8), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids('<image>'),
        pad_token_id=tokenizer.pad_token_id)
    image_processor = SmolVLMImageProcessorPil(size=dict(longest_edge=2 * TILE),
                                               max_image_size=dict(longest_edge=TILE))
    save_vlm(folder, config, tokenizer, image_processor)
    template = json.dumps(dict(chat_template=SMOLVLM_TEMPLATE))
    (folder / 'chat_template.json').write_text(template)


def save_internvl(folder):
    names = dict(start_image_token='<img>', end_image_token='</img>', video_token='<video>',
                 context_image_token='<IMG_CONTEXT>')
    tokenizer = bytes_tokenizer(SPECIAL['internvl'], extra_special_tokens=names,
                                chat_template=INTERNVL_TEMPLATE)
    config = InternVLConfig(
        text_config=dict(TEXT, model_type='qwen2', vocab_size=len(tokenizer)),
        vision_config=dict(VISION, image_size=[TILE] * 2, patch_size=[8] * 2), image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'))
    image_processor = GotOcr2ImageProcessorPil(size=dict(height=TILE, width=TILE), max_patches=4)
    save_vlm(folder, config, tokenizer, image_processor)


def save_vlm(folder, config, tokenizer, image_processor):
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config)
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (vlm, tokenizer, image_processor):
        part.save_pretrained(folder)


def save_qwen(kind, folder, **vision):
    """Another Qwen, with the tokenizer and the image processor of the tiny Qwen2.5-VL."""
    _, chat = load_vlm(save_tiny_vlm(folder))
    mrope = dict(rope_type='default', rope_theta=10000.0, mrope_section=[2, 3, 3])
    text = dict(TEXT, vocab_size=len(chat.tokenizer), rope_parameters=mrope)
    ids = {f'{name}_token_id': chat.tokenizer.convert_tokens_to_ids(token) for name, token in (
        ('vision_start', '<|vision_start|>'), ('vision_end', '<|vision_end|>'),
        ('image', '<|image_pad|>'), ('video', '<|video_pad|>'))}
    config = kind(text_config=text, vision_config=dict(
        depth=2, num_heads=2, patch_size=8, temporal_patch_size=1, **vision), **ids)
    save_vlm(folder, config, chat.tokenizer, chat.image_processor)


SAVE = {'smolvlm': save_smolvlm, 'internvl': save_internvl, 'qwen2.5-vl': save_tiny_vlm,
        'qwen2-vl': partial(save_qwen, Qwen2VLConfig, embed_dim=32, hidden_size=64),
        'qwen3-vl': partial(save_qwen, Qwen3VLConfig, hidden_size=32, intermediate_size=64,
                            out_hidden_size=64, deepstack_visual_indexes=[0],
                            num_position_embeddings=16)}


@pytest.fixture(scope='module', params=list(SAVE))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('vlm') / request.param
    SAVE[request.param](path)
    return str(path)


@pytest.fixture(scope='module')
def opened(folder):
    vlm, chat = load_vlm(folder)
    return vlm.eval(), chat


def photo(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


COUNT = 'How many table(s) are in this room?'
SQUARE, WIDE = photo(TILE, TILE), photo(2 * TILE, TILE, 1)


def talk(*texts, images=()):
    return dict(images=list(images), conversations=turns(*[
        (('human', 'gpt')[i % 2], text) for i, text in enumerate(texts)]))


def learned(chat, encoded):
    return chat.tokenizer.decode([token for token in encoded['labels'] if token != -100])


def test_labels_are_the_answers_and_their_ends(opened):
    _, chat = opened
    end = chat.tokenizer.decode([chat.end_of_turn])
    item = talk(f'<image><image>{COUNT}', '12', f'<image>{COUNT}', '3',
                images=[SQUARE, WIDE, SQUARE])
    encoded = chat.encode(item)
    assert learned(chat, encoded).replace(' ', '') == f'12{end}3{end}'
    for token, label in zip(encoded['input_ids'], encoded['labels'], strict=True):
        assert label in (-100, token)

    # a question without its answer is the beginning of the whole
    asked = chat.encode(talk(f'<image><image>{COUNT}', images=[SQUARE, WIDE]))['input_ids']
    assert encoded['input_ids'][:len(asked)] == asked
    assert chat.encode(talk(COUNT, '3'))['labels'].count(chat.end_of_turn) == 1
    assert set(chat.encode(talk(COUNT))['labels']) == {-100}


@torch.no_grad()
def test_every_tile_has_its_tokens_and_every_token_its_tile(opened):
    """The placeholders of a sample are exactly the rows that the VLM makes of its pictures."""
    vlm, chat = opened
    samples = [[], [SQUARE], [WIDE, SQUARE], [SQUARE, SQUARE, photo(3 * TILE, 2 * TILE)]]
    items = [chat.encode(talk('<image>' * len(images) + COUNT, '3', images=images))
             for images in samples]
    batch = chat.batch(items)
    assert batch['input_ids'].shape[1] % 32 == 0  # few lengths: what is planned for one is reused
    model = SpatialVLM(vlm, build_adapter(vlm, 24)).eval()
    labels = batch.pop('labels')
    model(latents=[torch.randn(5, 24)] * len(samples), **batch)  # counts rows against placeholders
    rows = len(model.image_tokens)
    assert rows == sum(item['input_ids'].count(chat.image_token_id) for item in items)
    assert (labels != -100).sum() == sum(label != -100 for item in items
                                         for label in item['labels'])


def test_what_stands_for_a_picture(opened):
    """To the letter, as the family's own processor lays it out."""
    vlm, chat = opened
    text = chat.tokenizer.decode(chat.encode(talk(f'<image>{COUNT}', images=[WIDE]))['input_ids'])
    if vlm.config.model_type == 'smolvlm':
        edge, four = '<fake_token_around_image>', '<image>' * 4
        rows = f'{edge}<row_1_col_1>{four}{edge}<row_1_col_2>{four}\n'
        whole = f'\n{edge}<global-img>{four}{edge}'
        assert text == f'<|im_start|>User:{rows}{whole}{COUNT}<end_of_utterance>\nAssistant:'
    elif vlm.config.model_type == 'internvl':
        picture = f'<img>{"<IMG_CONTEXT>" * 3 * 4}</img>\n'  # two tiles, and the whole
        assert text == (f'<|im_start|>user\n{picture}{COUNT}<|im_end|>\n<|im_start|>assistant\n')
    else:
        tokens = '<|image_pad|>' * 18  # 96 x 48 pixels: the fewest pixels are 64 x 64
        assert f'<|vision_start|>{tokens}<|vision_end|>' in text
        has_prompt = 'You are a helpful assistant.' in text
        assert has_prompt == (vlm.config.model_type != 'qwen3_vl')


def test_fewer_pixels_fewer_tiles(folder):
    counts = []
    for limit in (TILE ** 2, 4 * TILE ** 2, None):
        _, chat = load_vlm(folder, max_pixels=limit)
        encoded = chat.encode(talk(f'<image>{COUNT}', images=[photo(4 * TILE, 4 * TILE)]))
        counts.append(encoded['input_ids'].count(chat.image_token_id))
    assert counts[0] == 4
    assert counts == sorted(counts)
    assert counts[1] > counts[0]


def test_special_tokens_in_a_text_are_text(opened):
    _, chat = opened
    plain = chat.encode(talk('<image>x', 'x', images=[SQUARE]))['input_ids']
    special = [token.content for token in chat.tokenizer.added_tokens_decoder.values()
               if token.special]
    for name in (*special, '\ud800'):  # (or half a character)
        item = talk(f'<image>what is {as_text(name)}?', f'{as_text(name)} it is', images=[SQUARE])
        ids = chat.encode(item)['input_ids']
        for token in (chat.image_token_id, chat.end_of_turn):
            assert ids.count(token) == plain.count(token), name


def test_pictures_in_an_answer_are_not_learned(opened):
    _, chat = opened
    encoded = chat.encode(talk('Show me two.', 'here <image> and <image> it is',
                               images=[SQUARE, WIDE]))
    assert chat.image_token_id not in encoded['labels']
    text = learned(chat, encoded)
    end = chat.tokenizer.decode([chat.end_of_turn])
    known = set(chat.tokenizer.all_special_tokens) - {end}
    assert not any(token in text for token in known if token != chat.tokenizer.unk_token)
    assert text.endswith(end)


def test_it_can_be_sent_to_another_process(opened):
    _, chat = opened
    item = talk(f'<image>{COUNT}', '3', images=[WIDE])
    there, here = pickle.loads(pickle.dumps(chat)).encode(item), chat.encode(item)
    assert there['input_ids'] == here['input_ids']
    assert torch.equal(there['pixel_values'], here['pixel_values'])


def test_marks_of_ours_in_a_text_change_nothing(opened):
    _, chat = opened
    plain = chat.encode(talk('what?', 'a table'))
    assert chat.encode(talk('what?', 'a \ue002table')) == plain


def test_empty_texts(opened):
    _, chat = opened
    for item in (talk('', '3'), talk('<image>', '3', images=[SQUARE]), talk('x', '')):
        assert chat.encode(item)['labels'].count(chat.end_of_turn) == 1


def test_more_places_than_pictures(opened):
    with pytest.raises(InputError, match='2 <image> tokens for 1 images'):
        opened[1].encode(talk(f'<image><image>{COUNT}', '1', images=[SQUARE]))
    with pytest.raises(InputError, match='0 <image> tokens for 1 images'):
        opened[1].encode(talk(COUNT, '1', images=[SQUARE]))


@torch.no_grad()
def test_is_the_plain_vlm_at_step_0_and_batches_change_no_logits(opened, folder):
    vlm, chat = opened
    items = [chat.encode(talk(f'<image>{COUNT}', '3', images=[WIDE])),
             chat.encode(talk(f'<image><image>{COUNT}', '3', COUNT, 'table', images=[SQUARE] * 2))]
    batch = chat.batch(items)
    labels = batch.pop('labels')
    known = labels != -100
    plain = load_vlm(folder)[0].eval()
    expected = plain(**batch).logits
    model = SpatialVLM(load_vlm(folder)[0], build_adapter(plain, 24)).eval()
    quick = lean_batch(dict(batch), model.vlm, 'cpu')  # without a mask: padding comes last
    z = [torch.randn(5, 24), torch.randn(7, 24)]
    logits = model(latents=z, **quick).logits
    assert torch.allclose(logits[known], expected[known], atol=1e-5)

    torch.nn.init.normal_(model.adapter.mlp.fc2.weight)
    logits = model(latents=z, **quick).logits
    assert (logits - expected)[known].abs().max() > 1e-3
    for i in range(2):  # a sample on its own
        alone = chat.batch(items[i:i + 1])
        del alone['labels']
        alone = lean_batch(alone, model.vlm, 'cpu')
        length = alone['input_ids'].shape[1]
        assert torch.allclose(model(latents=z[i:i + 1], **alone).logits[0], logits[i, :length],
                              atol=1e-4)


def test_attention_in_fp32_changes_nothing_but_rounding(folder):
    vlm, chat = load_vlm(folder)
    model = SpatialVLM(vlm)
    batch = chat.batch([chat.encode(talk(f'<image>{COUNT}', '3', images=[WIDE])),
                        chat.encode(talk(f'<image>{COUNT} Say.', '12', images=[WIDE]))])
    batch = lean_batch(batch, vlm, 'cpu')
    del batch['labels']

    def run():
        vlm.zero_grad()
        exact = model(**batch).logits
        with torch.autocast('cpu', torch.bfloat16):
            coarse = model(**batch).logits
        coarse.float().square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in vlm.parameters() if p.grad is not None])
        return exact.detach(), coarse.detach().float(), gradient

    exact, coarse, gradient = run()
    attend_in_fp32(vlm, torch.device('cpu'))
    exact2, coarse2, gradient2 = run()
    assert torch.equal(exact, exact2)
    assert not torch.equal(coarse, coarse2)       # it is used
    assert (coarse2 - exact).norm() < 0.05 * exact.norm()
    assert F.cosine_similarity(gradient, gradient2, dim=0) > 0.99


def test_one_step_save_load_and_generate(opened, folder, tmp_path):
    """From pictures to an answer learned by heart, the same from the saved folder, with left
    padding, and with the pictures read once."""
    torch.manual_seed(0)
    vlm, chat = load_vlm(folder)
    model = SpatialVLM(vlm, build_adapter(vlm, 24)).train_only('adapter+llm')
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any('vision' in name or 'visual' in name for name in frozen)
    assert not any('layers' in name and 'vision' not in name and 'visual' not in name
                   for name in frozen)
    items = [talk(f'<image>{COUNT}', '12', images=[WIDE]),
             talk(f'<image>{COUNT} A table?', 'table', images=[WIDE])]
    z = [torch.randn(5, 24)] * 2
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    found = []
    for _ in range(90):
        batch = lean_batch(chat.batch([chat.encode(item) for item in items]), vlm, 'cpu')
        labels = batch.pop('labels')
        loss = answer_loss(model(latents=z, use_cache=False, **batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.02 < found[0]
    assert math.isfinite(found[-1])

    settings = dict(vlm=folder, latents='psfm', encoder='')
    vlm.generation_config.eos_token_id = None     # a folder need not name the end of a turn
    save_spatial_vlm(model, chat, str(tmp_path), settings, with_vlm=True)
    model, chat, _ = load_spatial_vlm(str(tmp_path))
    model.eval()
    questions = [dict(item, conversations=item['conversations'][:1]) for item in items]
    assert generate(model, chat, z, questions, 8) == ['12', 'table']
    reading = Reading(model, chat, [[WIDE]], z[:1], contextlib.nullcontext())
    texts = [turn['conversations'][0]['value'].removeprefix('<image>') for turn in questions]
    assert reading.answer([(0, text) for text in texts], 8) == ['12', 'table']


@pytest.mark.parametrize('family', ['smolvlm', 'internvl'])
def test_finetune_from_end_to_end(family, tmp_path):
    """finetune.py on one's own records, with what it says of the run."""
    SAVE[family](tmp_path / 'vlm')
    records = []
    for i in range(6):
        picture(tmp_path / f'{i}.png', (96, 64))
        records.append(dict(image=f'{i}.png', conversations=turns(
            ('human', '<image>\nWhat is it?'), ('gpt', f'number {i}'))))
    (tmp_path / 'data.json').write_text(json.dumps(records))
    out = tmp_path / 'run'
    finetune.main(['--config', 'photos', '--vlm', str(tmp_path / 'vlm'), '--encoder',
                   'weights/psfm_small.safetensors', '--data', str(tmp_path / 'data.json'),
                   '--media', str(tmp_path), '--steps', '2', '--val-scenes', '2', '--log-every',
                   '1', '--cache', '', '--accumulate', '1', '--out', str(out), '--device', 'cpu'])
    assert [step for step, _ in losses(out)] == [1, 2]
    assert math.isfinite(read_json(str(out / 'metrics.json'))['loss'])


@pytest.mark.parametrize('spoil,message', [
    (lambda folder: (folder / 'chat_template.json').unlink(), 'has no chat template'),
    (lambda folder: change(folder / 'config.json', model_type='idefics3'), 'knows Qwen2'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'1234567890'), 'no VLM at'),
    (lambda folder: widen(folder / 'model.safetensors'), 'no VLM at'),
    (lambda folder: change_template(folder, "<end_of_utterance>\n", ''), 'nothing after an answer'),
    (lambda folder: change_template(folder, "'<image>'", "'<image><image>'"),
     'puts 2 <image> for 1'),
    (lambda folder: change_template(folder, "'<image>'", "''"), 'puts 0 <image> for 1 images'),
    (lambda folder: change_template(folder, '{% endfor %}', ''), 'cannot lay out a conversation'),
    (lambda folder: (folder / 'preprocessor_config.json').unlink(missing_ok=True) or (
        folder / 'processor_config.json').unlink(missing_ok=True), 'no VLM at')])
def test_folders_that_are_not_whole(spoil, message, tmp_path):
    save_smolvlm(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        _, chat = load_vlm(str(tmp_path))
        chat.encode(talk('<image>what?', 'this', images=[SQUARE]))


def test_a_tokenizer_of_another_family(tmp_path):
    save_internvl(tmp_path)
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(InputError, match='is not that of a internvl|no chat template'):
        load_vlm(str(tmp_path))


def change_template(folder, old, new):
    assert old in SMOLVLM_TEMPLATE
    template = json.dumps(dict(chat_template=SMOLVLM_TEMPLATE.replace(old, new)))
    (folder / 'chat_template.json').write_text(template)


def widen(path):
    """Every vector of the weights is one longer than the configuration says."""
    state = load_file(path)
    save_file({name: F.pad(x, (0, 1)) if x.ndim == 1 else x for name, x in state.items()}, path,
              {'format': 'pt'})


def change(path, **values):
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **values)))
