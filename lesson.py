"""
A lesson in Predictive Spatial Field Modeling, step by step: a minute or two on two cores.

Run it as a script (`python lesson.py`), or open it in an editor that shows `# %%` cells as a
notebook and step through it. Pictures go to out/lesson/. It uses the method (model.py, vggt.py,
psfm.py), its optimizers (optim.py) and the procedural rooms (rooms.py). The exercises are at the
end.
"""
# %% Before we start
import os
import sys
from types import SimpleNamespace

import torch
from PIL import Image

from model import take_views
from optim import make_optimizers, set_rates, take_step
from psfm import PSFM, PSFMConfig, context_index, load_psfm, random_view_mask
from rooms import make_intrinsics, make_rooms, make_walk, render, room_seed
from vggt import VGGT

if '--help' in sys.argv:
    print(__doc__)
    sys.exit()
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdecimal() else 200
torch.manual_seed(0)
os.makedirs('out/lesson', exist_ok=True)


def save(name, *rows, tile=96):
    """Writes rows of tiles, each (V, h, w, 3) in [0, 1], as one picture."""
    width = max(len(row) for row in rows)
    canvas = Image.new('RGB', (width * (tile + 4), len(rows) * (tile + 4)), 'white')
    for r, row in enumerate(rows):
        for v, image in enumerate(row):
            pixels = Image.fromarray((255 * image).round().byte().numpy())
            pixels = pixels.resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(pixels, (v * (tile + 4), r * (tile + 4)))
    canvas.save(f'out/lesson/{name}.png')
    print(f'    out/lesson/{name}.png')


# %% 1. A room, and pictures of it
# A scene is something you can look at from anywhere. Ours is procedural, so that we know
# everything about it. The method gets nothing but the pictures: no poses, no depth, no labels.

def look_at_rooms(num_rooms, seed, num_views=8):
    """-> images (R, V, 3, 64, 64) in [0, 1]"""
    rooms = make_rooms(num_rooms, seed)
    extrinsics = make_walk(rooms, num_views, seed)
    intrinsics = make_intrinsics((64, 64), num_rooms, num_views)
    return render(rooms, extrinsics, intrinsics, (64, 64))['image'].float() / 255


held_out = look_at_rooms(4, room_seed('val', 0, 0))
print('1. eight pictures of a room that we shall never train on', tuple(held_out.shape))
save('1-pictures', held_out[0].permute(0, 2, 3, 1))

# %% 2. What the frozen backbone sees
# A VGGT turns pictures into features, one vector for each patch of 8 x 8 pixels, and says where
# the cameras stood. It was trained before (mini_vggt.py). We never touch its weights.

backbone = VGGT.from_pretrained('weights/mini_vggt.safetensors').freeze()
with torch.no_grad():
    views = backbone(held_out)
print('2. features (rooms, views, patches, channels)', tuple(views.features.shape),
      'cameras', tuple(views.extrinsics.shape))

# 256 channels cannot be seen. Their three main directions can, as red, green and blue.
flat = views.features[0].flatten(0, 1)                                     # (V N, 2C)
mean = flat.mean(0)
directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T   # (2C, 3)
low, high = [torch.quantile((flat - mean) @ directions, q, dim=0) for q in (0.02, 0.98)]


def paint(features):
    """Features (V, N, 2C) -> colours (V, 8, 8, 3)"""
    colours = ((features - mean) @ directions - low) / (high - low)
    return colours.clamp(0, 1).unflatten(1, (8, 8))


save('2-features', held_out[0].permute(0, 2, 3, 1), paint(views.features[0]))

# %% 3. Hide some of the views
# True is a target: hidden from the encoder. The first view is always context, because its camera
# defines the frame of the world.

VIEWS = 6         # of the eight pictures
MASK_RATIO = 0.5  # share of them that are targets

images = held_out[:, :VIEWS]
mask, num_context = random_view_mask(4, VIEWS, MASK_RATIO, torch.Generator().manual_seed(0))
print('3. targets of the first room', mask[0].tolist())

# The backbone's global attention mixes views. If context views could see targets, their features
# would leak what is to be predicted. So context attends to context alone, and targets to all.
# A few channels have a large variance: features are standardised, with the mean and deviation of
# four rooms.
psfm = PSFM(backbone, PSFMConfig(mask_ratio=MASK_RATIO))
psfm.set_statistics('geo', backbone(look_at_rooms(4, room_seed('train', 0, 0))).features)
context, views, _ = psfm.observe(images, mask, num_context)

# %% 4. Encode the context
# 32 learned queries read all patches of the context views. What they hold at the end is z.

z = psfm.encode(context, views.grid)
print('4. context features', tuple(context.shape), '-> z', tuple(z.shape))

# %% 5. Cast rays, and decode them
# For every view that we ask for: one token per patch, which knows its direction in the camera's own
# frame. Where the camera stands enters through attention (PRoPE). A decoder block lets each ray
# look at z, and at the other rays of its view.

cameras = views.extrinsics, views.intrinsics, images.shape[-2:], views.grid
predicted = psfm.decode(z, *cameras)
print('5. predicted features of every view', tuple(predicted.shape))

# %% 6. Compare
# Smooth L1, and one minus the cosine, over all views. This is PSFM.forward, in one call:

losses = psfm(images, view_mask=mask)
print('6. losses before training', {name: round(loss.item(), 3) for name, loss in losses.items()})

# %% 7. Train
# 120 rooms in memory, four of them per step.

recipe = SimpleNamespace(lr=2e-3, muon_lr=4e-3, weight_decay=1e-2, beta2=0.98)
print(f'7. {STEPS} steps')
world = torch.cat([look_at_rooms(40, room_seed('train', 0, i)) for i in range(3)])
optimizers = make_optimizers(psfm, recipe, torch.device('cpu'))
psfm.train()
for step in range(STEPS):
    rooms = torch.randint(len(world), (4,))
    chosen = torch.rand(4, 8).argsort(1)[:, :VIEWS]  # any six of the eight views, in any order
    losses = psfm(take_views(world[rooms], chosen))
    losses['loss'].backward()
    set_rates(optimizers, min(1, (step + 1) / 20) * (1 - step / STEPS))
    take_step(optimizers, psfm.parameters(), clip=1.0)
    if step % 50 == 0 or step == STEPS - 1:
        print(f'    step {step + 1:4d}   loss {losses["loss"].item():.3f}')
psfm.eval()

# %% 8. What does it see where it never looked?
# The unseen views of a room that training never showed. Rows: the picture, what the backbone sees,
# what we predict from this room's z, and what we predict from *another room's* z. After so few
# steps the last two rows look alike: z describes the room, but no furniture. Most of the prediction
# follows from the direction of the camera. The shipped weights are the same model, wider, trained
# for 2.6 hours.


def show(model, name):
    with torch.no_grad():
        context, views, _ = model.observe(images, mask, num_context)
        z = model.encode(context, views.grid)
        cameras = views.extrinsics, views.intrinsics, images.shape[-2:], views.grid
        ours = model.decode(z, *cameras)
        other = model.decode(z.roll(1, 0), *cameras)
    unseen = context_index(~mask, VIEWS - num_context)  # of the inverted mask: the targets
    pictures, seen, ours, other = [take_views(x, unseen)
                                   for x in (images, views.features, ours, other)]

    def r2(predicted):
        error = ((predicted - seen) / model.geo_std).square().sum()
        return 1 - (error / ((seen - model.geo_mean) / model.geo_std).square().sum()).item()

    print(f'    R2 of unseen views: this room\'s z {r2(ours):.2f}, another room\'s {r2(other):.2f}')
    print('    rows: picture, backbone, predicted from this room\'s z, from another room\'s z')
    save(name, pictures[0].permute(0, 2, 3, 1), paint(seen[0]), paint(ours[0]), paint(other[0]))


print(f'8. after {STEPS} steps')
show(psfm, '8-unseen')
print('   the shipped weights')
show(load_psfm('weights/psfm_small.safetensors')[0], '8-unseen-shipped')

# %% Exercises
# Change a few lines, then run `python lesson.py 600`: some three times as long. Unchanged, step
# 8 first prints R2 0.55 and 0.11. R2 of four rooms is noisy: ignore differences below 0.05.
#
# 1. Replace PRoPE by a camera token. In psfm.FieldDecoder, give every ray Linear(12 -> D) of its
#    extrinsics and use no position. The loss ends some 4 % higher and R2 hardly falls: what PRoPE
#    computes from poses can be learned. (The shipped weights then do not load: it stops there.)
# 2. Drop the context mask. In psfm.PSFM.observe, take the context from a pass in which all views
#    see each other (backbone(images)). Targets could now leak into z. Do they? Here loss and R2
#    stay as they were: this backbone puts little of one view into another. A larger one may.
# 3. One context view (MASK_RATIO 0.9), or six of eight (0.25, and VIEWS 8). With one view R2 falls,
#    with six it rises a little. Which unseen views lose most?
# 4. Another loss term. Drop the cosine in psfm.PSFM.compare: little changes. Then try it with
#    PSFMConfig(standardised=False): R2 falls by a tenth, with the cosine or without it, because a
#    few channels of large variance rule the L1.
# 5. A new category. Add a line to rooms.FURNITURE. `eval.py field`, which reads categories, now
#    refuses the backbone's weights: they never learned this one. Here, where only features count,
#    it still works: what do the features of the new pieces look like?
