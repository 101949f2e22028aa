"""
What is seen from one camera, for the page in the browser (page.py): the truth where there is one,
what the backbone sees there, and what a trained field predicts from its latents.

    RoomWorld      held-out rooms
    PhotoWorld     one scene of photographs

Both answer `room` (the plan and the pictures) and `view` (one camera: one pass of the decoder),
RoomWorld also `ask`, if it has a fine-tuned VLM: as dicts that are sent as they are. Pictures are
data URIs, tiles and shares are bytes in base64.
"""
import base64
import functools
import io
import math

import torch
from PIL import Image

from adapter import Reading
from backbone import fit_pictures
from common import InputError, autocast_on
from data import CELL, RoomPool
from draw import PAINT, color_basis, nearest_view, rgb, to_colors, to_grey
from measure import Score, read_map
from model import invert_pose, look_along, take_views
from questions import RoomQuestions, as_prompt, corners
from rooms import (CATEGORIES, EYE_HEIGHT, SCENE_UNIT, STRUCTURE, cameras_at, make_intrinsics,
                   render, scene_extrinsics, surface_classes)

NUM_ROOMS = 96                      # held-out rooms to walk through


# -----------------------------------------------------------------------------
# what is sent: pictures and tiles

def to_picture(image):
    """(3, H, W) in [0, 1] -> a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image.permute(1, 2, 0))).save(buffer, 'JPEG', quality=85)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def as_bytes(x):
    """Numbers in [0, 1] -> a byte each, as text."""
    return base64.b64encode(to_bytes(x).tobytes()).decode()


def as_tile(image):
    """(h, w, 3) in [0, 1] -> its size and its colours."""
    return dict(height=image.shape[0], width=image.shape[1], bytes=as_bytes(image))


def to_bytes(x):
    return (255 * x.float().clamp(0, 1)).round().byte().cpu().numpy()


# -----------------------------------------------------------------------------
# the field

def attention_to_latents(psfm, decode):
    """How much each patch attends to each latent in the decoder's last block, mean over the heads:
    calls decode() -> its result, shares (B V, N, Q). Computed beside the fused kernel, which does
    not tell."""
    attention = psfm.decoder.transformer.blocks[-1].attn
    seen = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    try:
        result = decode()
    finally:
        hook.remove()
    x, position, _, num_rays = seen[0]
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B V, nh, tokens, d)
    q, k, _ = position.rotate(attention.q_norm(q.float()), attention.k_norm(k.float()), v)
    shares = (q[:, :, -num_rays:] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    registers = psfm.decoder.transformer.num_registers
    return result, shares[..., registers:x.shape[1] - num_rays]


class World:
    """Scenes to walk through, with a trained field. A subclass has `kind`, `views` (how many
    pictures), `whose` (latents one can take), `average` latents (1, Q, D), `room` and `view`."""
    answerer = None

    def __init__(self, psfm, config):
        self.psfm, self.config = psfm, config
        self.device = psfm.geo_mean.device
        self.num_latents, self.width = psfm.encoder.queries.shape

    def ask(self, room, question):
        raise InputError('there is no VLM: start with --vlm RUN')

    def forget(self, z, off):
        """z (1, Q, D) with the rows `off` replaced by those of the average latents."""
        z = z.clone()
        z[:, list(off)] = self.average[:, list(off)]
        return z

    def r2(self, predicted, features):
        """Of one view: both (N, 2C)."""
        score = Score(self.psfm)
        score.add(predicted, features)
        return score.result()['r2']

    def decode(self, z, extrinsics, intrinsics, size, grid):
        """z (B, Q, D) of one camera (3, 4) -> features (B, N, 2C), the first z's shares (N, Q)."""
        cameras = extrinsics.expand(len(z), 1, 3, 4), intrinsics.expand(len(z), 1, 3, 3)
        predicted, shares = attention_to_latents(
            self.psfm, lambda: self.psfm.decode(z, *cameras, size, grid))
        return predicted[:, 0], shares[0]


class RoomWorld(World):
    """Held-out rooms, where everything is known."""
    kind = 'rooms'
    views = RoomPool.VIEWS
    whose = 'own', 'other', 'average'  # latents of this room, of the next one, of many rooms

    def __init__(self, psfm, config, answerer=None):
        super().__init__(psfm, config)
        self.size = config.image_width, config.image_width
        self.answerer = answerer
        with torch.no_grad():
            pool = RoomPool('train', config.seed, 32, image_size=self.size, device=self.device)
            images = torch.cat([pool.render_block(i)[1]['images'] for i in range(8)])
            self.average = psfm.latents(images[:, ::2].float() / 255).mean(0, keepdim=True)

    @functools.lru_cache(maxsize=16)
    def block(self, index):
        pool = RoomPool('val', 0, NUM_ROOMS, image_size=self.size, device=self.device)
        return pool.render_block(index)

    def one(self, room):
        """-> Rooms with this room alone, its pictures (V, 3, H, W), its cameras (V, 3, 4)"""
        rooms, views = self.block(room // RoomPool.BLOCK)
        i = room % RoomPool.BLOCK
        return rooms[i:i + 1], views['images'][i].float() / 255, views['extrinsics'][i]

    @functools.cached_property
    def questions(self):
        return RoomQuestions('val', 0, NUM_ROOMS)

    def room(self, room):
        """What the page draws of a room before anyone stands in it."""
        rooms, images, extrinsics = self.one(room)
        outlines = corners(rooms.to('cpu'), 0)
        pieces = [dict(name=CATEGORIES[rooms.category[0, k]], corners=outlines[k].tolist(),
                       colour=rgb(PAINT[len(STRUCTURE) + int(rooms.category[0, k])]))
                  for k in rooms.present[0].nonzero()[:, 0].tolist()]
        eyes = invert_pose(extrinsics)[..., 3].tolist()
        ahead = extrinsics[:, 2].tolist()
        cameras = [dict(x=x, y=y, yaw=math.atan2(dy, dx))
                   for (x, y, _), (dx, dy, *_) in zip(eyes, ahead)]
        asked = []
        if self.answerer:
            asked = [dict(text=record['question'], options=record['options'] or [])
                     for record in self.questions.questions[room]]
        return dict(sides=rooms.size[0, :2].tolist(), pieces=pieces, cameras=cameras,
                    pictures=[to_picture(image) for image in images], questions=asked)

    @functools.lru_cache(maxsize=64)
    @torch.no_grad()
    def look(self, room, context):
        """What is made once of the context pictures. -> z, their patch tokens"""
        seen = self.one(room)[1][None, list(context)]
        return self.psfm.latents(seen), self.psfm.backbone.embed(seen)[0]

    @functools.lru_cache(maxsize=64)
    @torch.no_grad()
    def basis(self, room):
        """For the colours of features: the same from every camera of a room."""
        return color_basis(self.psfm.backbone(self.one(room)[1][None]).features)

    @torch.no_grad()
    def view(self, room, context, x, y, yaw, pitch, off=(), whose='own'):
        """All that is seen from one camera: metres and radians in the frame of the plan."""
        rooms, _, walk = self.one(room)
        z, patches = self.look(room, context)
        if whose == 'other':
            z = self.look((room + 1) % NUM_ROOMS, context)[0]
        z = self.average if whose == 'average' else self.forget(z, off)
        basis = self.basis(room)

        # the truth, ray-traced: a picture, and what its cells show
        position = torch.tensor([[[x, y, sum(EYE_HEIGHT) / 2]]])
        angles = [torch.tensor([[angle]]) for angle in (yaw, pitch, 0.0)]
        camera = cameras_at(position, *angles).to(self.device)  # (1, 1, 3, 4)
        intrinsics = make_intrinsics(self.size, 1, 1).to(self.device)
        seen = render(rooms, camera, intrinsics, self.size)
        image = seen['image']
        middle = slice(CELL // 2, None, CELL)  # of a cell
        classes = surface_classes(rooms, seen['surface'])[0, 0, middle, middle]
        depth = seen['depth'][0, 0, middle, middle] / SCENE_UNIT

        # what the backbone sees there, beside the context; what the field predicts, with z and
        # with the average z
        backbone = self.psfm.backbone
        own, grid = backbone.embed(image.float() / 255)
        num_context = len(context) if self.psfm.context == 'asymmetric' else None
        tokens = backbone.mix(torch.cat([patches, own], 1), grid, num_context, (-1,))[-1]
        features = backbone.patch_features(tokens)[0, -1]
        extrinsics = scene_extrinsics(torch.cat([walk[None, context[:1]], camera], 1))[0, 1]
        predicted, shares = self.decode(torch.cat([z, self.average]), extrinsics,
                                        intrinsics[0, 0], self.size, grid)
        read, logits = backbone.read_out(predicted[None, :1], grid)
        paint = torch.tensor(PAINT, device=self.device)
        far = depth.max()
        return dict(
            picture=to_picture(image[0, 0].float() / 255),
            tiles={'features': as_tile(to_colors(features, basis, grid)),
                   'predicted': as_tile(to_colors(predicted[0], basis, grid)),
                   'depth': as_tile(to_grey(1 - depth / far)),
                   'depth predicted': as_tile(to_grey(1 - read[0, 0] / far)),
                   'categories': as_tile(paint[classes]),
                   'categories predicted': as_tile(paint[logits[0, 0].argmax(-1)])},
            attention=as_bytes(shares / shares.amax(-1, keepdim=True)), grid=grid,
            far=SCENE_UNIT * far.item(),
            r2=self.r2(predicted[0], features), r2_camera=self.r2(predicted[1], features))

    @torch.no_grad()
    def ask(self, room, question):
        """The VLM's answer about the first pictures; question -1: the map. -> dict"""
        if not self.answerer:
            return super().ask(room, question)
        model, chat, latents = self.answerer
        pictures = self.questions.pictures(room)
        z = latents([pictures]) if latents else None
        reading = Reading(model, chat, [pictures], z, autocast_on(self.device, model.vlm.dtype))
        if question == -1:
            text, truth = self.questions.maps[room]
            answer = reading.answer([(0, text)], 160)[0]
            return dict(truth=truth, answer=answer, map=read_map(answer))
        records = self.questions.questions[room]
        if question >= len(records):
            raise InputError(f'question {question}: this room has {len(records)}')
        record = records[question]
        answer = reading.answer([(0, as_prompt(record))], 16)[0]
        return dict(truth=record['ground_truth'], answer=answer)


def level_camera(right, down, ahead, yaw, pitch):
    """A camera at a place in the world of photographs, without roll: yaw 0 looks to the
    right, a quarter turn ahead; pitch is up. -> extrinsics (3, 4)"""
    forward = torch.tensor([math.cos(yaw) * math.cos(pitch), -math.sin(pitch),
                            math.sin(yaw) * math.cos(pitch)])
    return look_along(torch.tensor([right, down, ahead]), forward, torch.tensor([0.0, 1.0, 0.0]))


class PhotoWorld(World):
    """One scene of photographs. Its cameras are the backbone's predictions; there is no truth but
    the pictures."""
    kind = 'photographs'
    whose = 'own', 'average'

    def __init__(self, psfm, config, pictures):
        super().__init__(psfm, config)
        images = fit_pictures(pictures, config.image_width, psfm.backbone.config.patch_size)
        self.images = images.to(self.device)[None].float() / 255  # (1, V, 3, H, W)
        self.views = len(pictures)
        # a row that is switched off becomes the mean of all rows: there are no training scenes here
        with torch.no_grad():
            self.average = psfm.latents(self.images).mean(1, keepdim=True)
            self.average = self.average.expand(1, self.num_latents, -1)

    @functools.lru_cache(maxsize=8)
    @torch.no_grad()
    def look(self, context):
        """-> z, what the backbone sees of all pictures as in training, depth, a basis for colours

        The world is the camera of the first context picture.
        """
        order = [*context, *(i for i in range(self.views) if i not in context)]
        order = torch.tensor(order, device=self.device)[None]
        mask = torch.arange(self.views, device=self.device)[None] >= len(context)
        has_depth = self.psfm.backbone.has_depth
        allowed, views, depth = self.psfm.observe(take_views(self.images, order), mask,
                                                  len(context), has_depth)
        back = order.argsort(1)
        views = views._replace(features=take_views(views.features, back),
                               extrinsics=take_views(views.extrinsics, back),
                               intrinsics=take_views(views.intrinsics, back))
        depth = take_views(depth, back)[0] if has_depth else None
        return self.psfm.encode(allowed, views.grid), views, depth, color_basis(views.features)

    def room(self, room, context=(0,)):
        _, views, _, _ = self.look(context)
        eyes = invert_pose(views.extrinsics[0])[..., 3].tolist()
        ahead = views.extrinsics[0, :, 2].tolist()
        cameras = [dict(x=x, y=z, yaw=math.atan2(dz, dx))
                   for (x, _, z), (dx, _, dz, _) in zip(eyes, ahead)]
        return dict(cameras=cameras, pieces=[], questions=[],
                    pictures=[to_picture(image) for image in self.images[0]])

    @torch.no_grad()
    def view(self, room, context, x, y, yaw, pitch, off=(), whose='own'):
        """The field where nobody stood, beside the nearest picture. x, y: right and ahead."""
        z, views, depth, basis = self.look(context)
        z = self.average if whose == 'average' else self.forget(z, off)
        height = invert_pose(views.extrinsics[0])[:, 1, 3].mean().item()
        camera = level_camera(x, height, y, yaw, pitch).to(self.device)
        size = self.images.shape[-2:]
        intrinsics = views.intrinsics[0].mean(0)
        predicted, shares = self.decode(z, camera, intrinsics, size, views.grid)
        near = nearest_view(views.extrinsics[0], camera)
        tiles = {'features': as_tile(to_colors(views.features[0, near], basis, views.grid)),
                 'predicted': as_tile(to_colors(predicted[0], basis, views.grid))}
        if depth is not None:
            far = depth.max()
            tiles['depth'] = as_tile(to_grey(1 - (depth[near] / far).unflatten(-1, views.grid)))
            if self.psfm.depth_probe is not None:
                read = self.psfm.read_depth(z, camera[None, None], intrinsics[None, None], size,
                                            views.grid)[0, 0] / far
                tiles['depth predicted'] = as_tile(to_grey(1 - read.unflatten(-1, views.grid)))
        return dict(picture=to_picture(self.images[0, near]), tiles=tiles, grid=views.grid,
                    attention=as_bytes(shares / shares.amax(-1, keepdim=True)))
