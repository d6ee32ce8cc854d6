"""A lesson of 90 minutes as a notebook: python lesson.py writes lesson.ipynb.

The notebook runs offline from top to bottom in a few minutes of computing; exercises are cells to fill in, checked by
exercises.py, with their solutions folded below them. SECTIONS is the lesson: texts, and cells of code.
"""

import inspect
import json
from pathlib import Path

import exercises
from checkpoints import write_whole
from command_line import OneLineParser, script

NOTEBOOK = Path(__file__).parent / "lesson.ipynb"


def exercise(name):
    """Two cells: the stub with its check, and the folded solution, under the name that the check asks for."""
    one = exercises.EXERCISES[name]
    stub = exercises.stub(name).split("\n\n\n")[1].strip()
    solution = inspect.getsource(one.solution).strip().replace(f"def {one.solution.__name__}(", f"def {one.function}(")
    return [("code", f"{stub}\n\n\nprint(check_function({name!r}, {one.function}).words)"),
            ("text", f"<details><summary>A solution</summary>\n\n```python\n{solution}\n```\n\n</details>")]


def talk(question, answer):
    """A question to talk about, and our answer to it, folded."""
    return ("text", f"**Talk about it:** {question}\n\n<details><summary>What we would say</summary>\n\n{answer}\n\n"
                    f"</details>")


SECTIONS = [
    ("text", """# From CNNs to Vision Transformers, in 90 minutes

Everything here is measured while you watch: run the cells from top to bottom. Exercises are functions to fill in; the
last line of each cell says what is off. The computing takes a few minutes in all and needs neither a GPU nor a network.

| minutes | |
|---|---|
| 0 to 10 | an image becomes a sequence |
| 10 to 30 | attention |
| 30 to 40 | positions and the CLS token |
| 40 to 50 | the block and the whole model |
| 50 to 65 | training one |
| 65 to 80 | looking inside |
| 80 to 90 | and the CNN? |"""),
    ("code", """%matplotlib inline
import math

import torch
import torch.nn.functional as F

from attention_views import AttentionVisualizer
from exercises import check_function
from measurements import count_parameters
from model_zoo import create_pretrained
from perturbations import predictions, shuffle_patches
from pictures import normalise
from visualizations import plot_images, plot_training_curves, visualize_patch_embedding
from vit_data import get_data_loaders, make_shapes

torch.manual_seed(0)
drawn = make_shapes(200, 32, start=50_000)  # shapes that no model here was trained on
plot_images(drawn.images[:8])"""),
    ("text", """## 0 to 10: an image becomes a sequence

A Transformer reads a sequence. An image is cut into patches, read row by row, and each patch is multiplied by one
matrix: the only place where pixels meet weights. **Guess:** how many patches of 4 x 4 pixels has an image of 32 x 32,
and how many numbers has each?"""),
    ("code", "visualize_patch_embedding(drawn.images[0], patch_size=4)"),
    *exercise("patch_embedding"),
    talk("which layer of a CNN does the same with its stride set to its kernel size?",
         """A convolution: its windows lie side by side and no longer overlap. Written that way it is the layer
`PatchEmbedding.proj` in `vit_model.py`."""),
    ("text", """## 10 to 30: attention

Every token asks (query), every token offers (key) and gives (value). The answer is a mean of the values, weighted by
how well queries meet keys. No weight here knows how far apart two tokens are: that is the first difference from a
convolution."""),
    *exercise("attention"),
    ("code", """views = AttentionVisualizer(create_pretrained("vit_nano_shapes"), device="cpu")
views.visualize_attention(drawn.images[0], layer_idx=-1)"""),
    ("text", """**Look:** the weights of one row sum to one, with those that go to CLS. What does the map show when you
choose a patch, `patch=(3, 3)`, in the place of CLS? Do the heads look at the same things? Layers and heads count
from 0; layer 0 is the first block."""),
    ("code", "views.visualize_all_heads(drawn.images[0])"),
    ("code", "views.visualize_attention_distance(drawn.images[:32])"),
    ("text", """Each point is a head: how far it looks on average. A convolution of 3 x 3 would lie near the bottom.
**Look:** how far are the points from the line of attention to all places alike?

## 30 to 40: positions and the CLS token

Attention reads a set: without positions the order of the patches is invisible to it. The blocks read one token more
than there are patches, CLS, which has no pixels and starts the same for every image. The head reads CLS alone."""),
    *exercise("positions"),
    ("text", """**Guess:** squares of 4 x 4 pixels change places, first on the grid of the ViT's own patches, then on
the same grid moved by 2 pixels, which cuts through them. How many answers stay right?"""),
    ("code", """model = create_pretrained("vit_nano_shapes")
images = normalise(drawn.images, model.mean, model.std)
for share in (0.0, 0.25, 0.5, 0.75):
    own, moved = ((predictions(model, shuffle_patches(images, 4, share, offset=offset)) == drawn.labels).float().mean()
                  for offset in (0, 2))
    print(f"{share:.0%} of the squares shuffled: {own:.0%} right on its own grid, {moved:.0%} on the moved one")"""),
    talk("this ViT has positions. What does it use them for, if a shuffle of its own patches costs it so little, and "
         "one that cuts them so much?",
         """For little. On its own grid every token arrives whole, only at another position, and which pieces are there
is enough to tell these shapes apart. On the moved grid hardly a token is whole, and most answers go: what this ViT does
without is the order of its own patches, not that of any squares. To a ConvNet neither grid is its own, as its windows
overlap."""),
    ("text", """## 40 to 50: the block and the whole model

Attention mixes the tokens, the MLP works on each by itself; both add to what comes in, and both read it
normalised."""),
    *exercise("block"),
    ("code", """block = model.blocks[0]
print(f"A block has {count_parameters(block):,} parameters, its MLP {count_parameters(block.mlp):,} of them.")
print(f"The model: {count_parameters(model):,}, in {len(model.blocks)} blocks.")"""),
    ("text", """## 50 to 65: training one

A ViT of half a million parameters on 4,000 drawn shapes, two epochs, under a minute. **Guess** its validation accuracy
before you run the cell; guessing the class gives 10%."""),
    ("code", """from train_vit import Trainer
from vit_model import create_vit_nano

n_epochs = 2
train_loader, val_loader = get_data_loaders(dataset="shapes", img_size=32, n_images=4_000)
trainer = Trainer(create_vit_nano(n_classes=10), device="cpu")
history = trainer.train(train_loader, val_loader, n_epochs=n_epochs, learning_rate=2e-3, progress=False)
print(f"validation accuracy {history['val_acc'][-1]:.1%}")
plot_training_curves(history)"""),
    talk("is the loss still falling at the end? The model of the next section was trained for longer.",
         """Compare the last two points of each curve; two epochs are a beginning. While training and validation stay
close together, more steps may help; where they part, more images or more augmentation may."""),
    ("text", """## 65 to 80: looking inside

Where does an answer come from? Every method gives a map; they do not agree. So ask each map a question that has an
answer: hide the patches that it calls important, and see whether the answer goes, sooner than in random order."""),
    *exercise("rollout"),
    ("code", "views.visualize_explanations(drawn.images[0])"),
    ("code", "views.visualize_logit_lens(drawn.images[0])"),
    ("code", """from explanations import selfcheck

for check in selfcheck(model, images[:4]):
    print({True: "holds:", False: "does not hold:", None: "does not apply:"}[check.holds], check.name)"""),
    talk("which map would you show to somebody, and what would you say about it?",
         """Any of them, together with its curves: how much sooner the answer goes, on this image, than in random order.
Over 500 images, in each of three models that we trained for it, all four did better than that where patches are hidden;
where they are shown only rollout and relevance always did (README, Looking inside). None of them says why the model
answers as it does."""),
    ("text", """To play with, any image of your own: `views.explore(["photo.jpg"])` gives a page.

## 80 to 90: and the CNN?

A convolution is attention that has decided beforehand where to look, exactly: nine heads, each at one place of the
kernel. What it gives up is reach; what it gets is that near things matter from the first step on.

In the last figure "shuffled" means the grid of the ViT's own patches again, which leaves its tokens whole and cuts
through the windows of the other two: what it costs them and what it costs the ViT are no answers to one question."""),
    ("code", """from cnn_vs_vit import shipped_subjects
from experiments import EXPERIMENTS

subjects = shipped_subjects(200)
bridge = EXPERIMENTS["convolution"]
print(bridge.say(bridge.measure(subjects)))
position = EXPERIMENTS["position"]
found = position.measure(subjects)
print(position.say(found))
position.draw(found)["patches_changed"]"""),
    ("text", """**The last question:** for which images would you take which? `python cnn_vs_vit.py --data-dir photos
--minutes 30` asks yours, three seeds each, and names no winner inside the noise."""),
]


def notebook():
    """The lesson in the notebook format, version 4.5, without outputs."""
    cells = []
    for number, (kind, text) in enumerate(SECTIONS):
        lines = text.splitlines(keepends=True)
        cell = dict(cell_type="markdown" if kind == "text" else "code", id=f"cell-{number}", metadata={}, source=lines)
        cells.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))
    kernel = dict(display_name="Python 3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel, language_info=dict(name="python")), nbformat=4,
                nbformat_minor=5)


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default=str(NOTEBOOK), help="where the notebook is written")
    options = parser.parse_args(argv)
    text = json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"
    write_whole(options.output, lambda file: file.write(text.encode()))
    print(f"{options.output}: {len(SECTIONS)} cells")


if __name__ == "__main__":
    script(main)
