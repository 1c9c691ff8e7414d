// Pictures on their way to the server, and maps over them.

export const ALLOWED = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// What the server takes of one picture: bytes, which base64 makes a third longer, pixels, and pixels of a side.
const BYTES = 7_000_000;
const PIXELS = 20_000_000;
const LONGEST = 10_000;
const SMALLER = 2048; // longer side of what was larger than that

function url(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// A file as it is, or smaller if the server would refuse it: its data URL, its name, and a note if it was changed.
export async function read(file) {
  const picture = new Image();
  const name = file.name || "pasted picture";
  picture.src = await url(file);
  await picture.decode().catch(() => null); // what the browser cannot read, the server judges
  const { naturalWidth: width, naturalHeight: height } = picture;
  const fits = file.size <= BYTES && width * height <= PIXELS && Math.max(width, height) <= LONGEST;
  return fits || !width ? { url: picture.src, name } : { name, ...smaller(picture, name) };
}

function smaller(picture, name) {
  const scale = Math.min(1, SMALLER / Math.max(picture.naturalWidth, picture.naturalHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(2, Math.round(picture.naturalWidth * scale));
  canvas.height = Math.max(2, Math.round(picture.naturalHeight * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // as the server does with what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return { url: canvas.toDataURL("image/jpeg", 0.95), note: `${name} was made smaller: ${canvas.width} × ${canvas.height} pixels.` };
}

// Darkens what an answer looked at least; rows x columns of weights, the largest stays clear.
export function overlay(figure, rows, aspect) {
  figure.querySelector("canvas")?.remove();
  const canvas = document.createElement("canvas");
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "The brighter a place, the more the model looked at it as it began to answer");
  const most = Math.max(...rows.flat()) || 1;
  const pen = canvas.getContext("2d");
  rows.forEach((row, y) => row.forEach((weight, x) => {
    pen.fillStyle = `rgb(8 20 24 / ${(0.82 * (1 - weight / most)).toFixed(3)})`;
    pen.fillRect(x, y, 1, 1);
  }));
  place(canvas, figure.querySelector("img"), aspect);
  figure.append(canvas);
}

// Over the square that the encoder sees: the picture's middle, or the picture with margins, which the figure cuts off.
function place(canvas, { naturalWidth: width, naturalHeight: height }, aspect) {
  if (aspect === "squash" || !width || !height) return;
  const side = aspect === "crop" ? Math.min(width, height) : Math.max(width, height);
  const share = (part, whole) => `${(100 * part / whole).toFixed(3)}%`;
  Object.assign(canvas.style, {
    width: share(side, width), left: share((width - side) / 2, width),
    height: share(side, height), top: share((height - side) / 2, height),
  });
}
