"""A tiny competition folder, written by hand: what the data's tests read, and what they break."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

DAY = ['AVL5215', 'BRA2E19', 'KDO4C26', 'QXR0157']               # Scenario-A: png, corners
NIGHT = ['CDE1234', 'FGH3A56', 'IFY3002', 'JKL7M89', 'OPQ1290', 'RIO2A18', 'SUN0B77', 'TUV8888'] # Scenario-B: jpg, corners absent or empty
TEST = ['STU5V67', 'WXY8901', 'ZAB4C55']
BOX = {'top-left': [2, 2], 'top-right': [43, 2], 'bottom-right': [43, 15], 'bottom-left': [2, 15]}


def layout(text): return 'Mercosur' if text[4].isalpha() else 'Brazilian'


def write_track(folder, text, ext, corners=None, hr=True):
    "Five frames a resolution, each a little darker than the one before; annotations where there is HR."
    folder.mkdir(parents=True)
    for i in range(1, 6):
        plate = np.full((30, 84, 3), 210 - 15 * i, np.uint8)
        cv2.putText(plate, text, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
        if hr: cv2.imwrite(f'{folder}/hr-00{i}{ext}', plate)
        cv2.imwrite(f'{folder}/lr-00{i}{ext}', cv2.resize(plate, (45, 17), interpolation=cv2.INTER_AREA))
    if hr: annotate(folder, dict(plate_layout=layout(text), plate_text=text) | ({} if corners is None else dict(corners=corners)))
    return folder


def annotate(folder, about): (folder/'annotations.json').write_text(about if isinstance(about, str) else json.dumps(about))


@pytest.fixture
def competition(tmp_path) -> Path:
    "4 daylight tracks, 8 at night, 3 to test with texts beside them; no text twice, both layouts everywhere."
    root = tmp_path/'LRLPR-26'
    for i, text in enumerate(DAY, 1): write_track(root/f'train/Scenario-A/{layout(text)}/track_{i:05d}', text, '.png', {'lr-001.png': BOX})
    for i, text in enumerate(NIGHT, 10001): write_track(root/f'train/Scenario-B/{layout(text)}/track_{i}', text, '.jpg', {} if i % 2 else None)
    for i, text in enumerate(TEST, 20001): write_track(root/f'test/track_{i}', text, '.jpg', hr=False)
    rows = [f'track_{i},{text},{layout(text)}' for i, text in enumerate(TEST, 20001)]
    (root/'test_labels.csv').write_text('\n'.join(['track,text,layout', *rows]) + '\n')
    return root
