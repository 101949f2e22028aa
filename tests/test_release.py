"""The second teacher. (What is published of Spa3R: test_release_files.py, test_parity.py.)"""
import pytest
import torch
import transformers
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from common import InputError
from release import SemanticTeacher, load_teacher


def test_semantic_teacher_from_transformers():
    config = Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                                       patch_size=14, image_size=28)
    teacher = SemanticTeacher(Dinov2WithRegistersModel(config), width=42)
    features = teacher.train()(torch.rand(2, 3, 3, 16, 24), (2, 3))
    assert features.shape == (2, 3, 6, 24) and teacher.feature_dim == 24
    assert not features.requires_grad
    assert not teacher.model.training


def test_a_gated_teacher_says_how_to_get_it(monkeypatch):
    def refuse(name):
        raise OSError('You are trying to access a gated repo.\nAccess to it is restricted')

    monkeypatch.setattr(transformers.AutoModel, 'from_pretrained', refuse)
    message = 'gated repo.*hf auth login.*--teacher facebook/dinov2-with-registers-large'
    with pytest.raises(InputError, match=message):
        load_teacher('facebook/dinov3-vitl16-pretrain-lvd1689m')


def test_no_name_is_no_teacher():
    assert load_teacher('') is None
