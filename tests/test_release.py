"""The second teacher, and what is published of Spa3R in miniature."""
import shutil

import numpy as np
from PIL import Image
import pytest
from safetensors.torch import save_file
import torch
import transformers
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from adapter import build_adapter, SceneLatents, SpatialVLM
from common import InputError
from mini_vlm import build_tokenizer, build_vlm
from psfm import PSFM, PSFMConfig
from release import (SemanticTeacher, load_teacher, open_psfm, open_spatial_vlm, read_folder,
                     released_adapter)
from vggt import VGGT, VGGTConfig


def test_semantic_teacher_from_transformers():
    config = Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                                       patch_size=14, image_size=28)
    teacher = SemanticTeacher(Dinov2WithRegistersModel(config), width=42)
    features = teacher.train()(torch.rand(2, 3, 3, 16, 24), (2, 3))
    assert features.shape == (2, 3, 6, 24) and teacher.feature_dim == 24
    assert not features.requires_grad
    assert not teacher.model.training


def test_a_folder_is_read_whatever_its_name(tmp_path):
    """Brackets are a pattern's: rel[1] would also be rel1."""
    for name, value in (('rel1', 1.0), ('rel[1]', 2.0)):
        (tmp_path / name).mkdir()
        save_file({'x': torch.tensor(value)}, tmp_path / name / 'model.safetensors')
    assert read_folder(str(tmp_path / 'rel[1]'))['x'] == 2


def test_a_gated_teacher_says_how_to_get_it(monkeypatch):
    def refuse(name, **_):
        raise OSError('You are trying to access a gated repo.\nAccess to it is restricted')

    monkeypatch.setattr(transformers.AutoModel, 'from_pretrained', refuse)
    message = 'gated repo.*hf auth login.*--teacher facebook/dinov2-with-registers-large'
    with pytest.raises(InputError, match=message):
        load_teacher('facebook/dinov3-vitl16-pretrain-lvd1689m')


def test_a_teacher_in_half_precision_keeps_its_norms_in_fp32(tmp_path):
    config = Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                                       patch_size=14, image_size=28)
    Dinov2WithRegistersModel(config).half().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert teacher(torch.rand(1, 2, 3, 28, 28), (2, 2)).isfinite().all()
    (tmp_path / 'config.json').write_text('{"model_type": "nobody"}')
    with pytest.raises(InputError, match='could not be loaded'):
        load_teacher(str(tmp_path))


def test_an_empty_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / 'spa3r.ckpt').write_text('')
    with pytest.raises(InputError, match=r'spa3r.ckpt cannot be read .* \(EOFError\)'):
        open_psfm(str(tmp_path / 'spa3r.ckpt'))


def test_what_is_no_release_is_one_sentence(tmp_path):
    for state in ({}, {'query_embed.weight': torch.zeros(6, 128)}):
        torch.save(state, tmp_path / 'spa3r.ckpt')
        with pytest.raises(InputError, match='holds no released Spa3R'):
            open_psfm(str(tmp_path / 'spa3r.ckpt'))


def test_a_teacher_that_sees_no_patches_is_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="could not be loaded .*no attribute 'patch_size'"):
        load_teacher(str(tmp_path))


def test_no_name_is_no_teacher():
    assert load_teacher('') is None


QUESTION = 'How many table(s) are there?'
ADAPTER = [('projector.fc1', 'geometry_projector.0'), ('projector.fc2', 'geometry_projector.2'),
           ('attention', 'geom_cross_attention'), ('norm', 'ln'),
           ('mlp.fc1', 'geometry_adaptor.0'), ('mlp.fc2', 'geometry_adaptor.2'),
           ('gate', 'geometry_gate.0')]
SPA3R = [('encoder.projection.', 'projection.'), ('encoder.queries', 'query_embed.weight'),
         ('encoder.transformer.', 'encoder.'), ('decoder.ray_embed.', 'pose_tokenizer.'),
         ('decoder.transformer.', 'decoder.'), ('backbone.', '')]
QWEN = [('model.visual.', 'visual.'), ('model.language_model.', 'model.')]


def under(name, table):
    """A name of ours, as the release calls it."""
    pairs = [pair for pair in table if name.startswith(pair[0])]
    ours, theirs = pairs[0] if pairs else ('', '')
    return theirs + name.removeprefix(ours)


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A tiny spa3r.ckpt, and the model it came from."""
    torch.manual_seed(0)
    vggt = VGGT(VGGTConfig(width=64, depth=2, num_heads=1, embed_depth=1, embed_heads=1,
                           position_grid=4, global_qk_norm='rms', camera_depth=1, camera_heads=1,
                           heads=('camera',)))
    sizes = PSFMConfig(width=128, encoder_depth=1, decoder_depth=1, num_heads=2, num_latents=6,
                       standardised=False)
    psfm = PSFM(vggt, sizes).eval()
    state = {f'model.{under(name, SPA3R)}': x for name, x in psfm.state_dict().items()
             if not name.startswith('geo_')}
    # what only trained it
    state['model.dino.cls_token'] = torch.zeros(1)
    state['model.heads.sem.fc1.weight'] = torch.zeros(3, 3)
    path = str(tmp_path_factory.mktemp('released') / 'spa3r.ckpt')
    torch.save(dict(state_dict=state, epoch=3), path)
    return path, psfm


@torch.no_grad()
def test_released_encoder(released):
    path, psfm = released
    again, config = open_psfm(path)
    images = torch.rand(1, 2, 3, 28, 42)
    assert torch.allclose(again.latents(images), psfm.latents(images), atol=1e-5)
    assert config.width == 128

    cameras = torch.eye(4)[:3].expand(1, 2, 3, 4), torch.eye(3).expand(1, 2, 3, 3)
    asked = psfm.latents(images), *cameras, (28, 42), (2, 3)
    assert torch.allclose(again.decode(*asked), psfm.decode(*asked), atol=1e-5)


@torch.no_grad()
def test_a_release_in_half_precision(released, tmp_path):
    path, psfm = released
    state = torch.load(path, weights_only=True)['state_dict']
    torch.save({name: x.half() for name, x in state.items()}, tmp_path / 'half.pt')
    again, _ = open_psfm(tmp_path / 'half.pt')
    images = torch.rand(1, 2, 3, 28, 42)
    assert torch.allclose(again.latents(images), psfm.latents(images), atol=0.05)


def test_a_folder_with_weights_of_ours_is_not_taken_for_the_release(tmp_path):
    shutil.copy('weights/psfm_small.safetensors', tmp_path / 'model.safetensors')
    psfm, config = open_psfm(tmp_path)
    assert config.data == 'rooms' and psfm.standardised


def test_files_that_are_no_released_encoder(released, tmp_path):
    path, _ = released
    torch.save(dict(state_dict={'x': torch.zeros(1)}), tmp_path / 'other.pt')
    with pytest.raises(InputError, match='holds no released Spa3R'):
        open_psfm(tmp_path / 'other.pt')

    state = torch.load(path, weights_only=True)['state_dict']
    del state['model.projection.weight']
    torch.save(dict(state_dict=state), tmp_path / 'part.ckpt')
    with pytest.raises(InputError, match='missing encoder.projection.weight'):
        open_psfm(tmp_path / 'part.ckpt')


def test_names_of_the_adapter():
    state = {'model.geom_cross_attention.q_norm.weight': 1, 'geometry_gate.0.bias': 2,
             'model.visual.blocks.0.ln.weight': 3, 'model.layers.0.ln.weight': 4,
             'geometry_encoder.spa3r.model.ln.weight': 5, 'model.ln.bias': 6}
    assert released_adapter(state) == {'attention.q_norm.weight': 1, 'gate.bias': 2,
                                       'norm.bias': 6}


@torch.no_grad()
def test_released_vlm(released, tmp_path):
    path, _ = released
    torch.manual_seed(0)
    vlm, chat = build_vlm(build_tokenizer([QUESTION] * 20, ['table']), width=64, depth=1)
    adapter = build_adapter(vlm, 128)
    torch.nn.init.normal_(adapter.mlp.fc2.weight)
    vlm.save_pretrained(tmp_path)
    chat.save_pretrained(tmp_path)
    state = {under(name, QWEN): x for name, x in vlm.state_dict().items()
             if name != 'lm_head.weight'}
    state.update({under(name, ADAPTER): x for name, x in adapter.state_dict().items()})
    for name, x in torch.load(path, weights_only=True)['state_dict'].items():
        state[name.replace('model.', 'geometry_encoder.spa3r.', 1)] = x

    def write():
        whole = {name: x.contiguous() for name, x in state.items()}
        save_file(whole, str(tmp_path / 'model.safetensors'), dict(format='pt'))

    write()
    model, chat, settings = open_spatial_vlm(str(tmp_path))
    assert settings['max_pixels'] == chat.made_of[-1] == 518 * 392  # as the release shows them
    assert open_spatial_vlm(str(tmp_path), max_pixels=784)[1].made_of[-1] == 784
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels)]
    turn = {'from': 'human', 'value': f'<image>{QUESTION}'}
    batch = chat.batch([chat.encode(dict(images=pictures, conversations=[turn]))])
    del batch['labels']
    latents = SceneLatents(settings['latents'], *open_psfm(settings['encoder']))
    latents.image_width = 56  # for speed
    z = latents([pictures])
    expected = SpatialVLM(vlm, adapter).eval()(latents=z, **batch).logits
    assert torch.equal(model.eval()(latents=z, **batch).logits, expected)

    del state['geom_cross_attention.q_norm.weight']
    write()
    with pytest.raises(InputError, match='is no Spa3-VLM'):
        open_spatial_vlm(str(tmp_path))
